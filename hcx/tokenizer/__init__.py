"""Byte-level tokenizers: training, the codec, special tokens and the chat format."""

from hcx.tokenizer.codec import Tokenizer
from hcx.tokenizer.special import (
    ASSISTANT,
    CHAT_TEMPLATE,
    END_OF_TEXT,
    END_OF_TURN,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    SPECIAL_TOKENS,
    USER,
)
from hcx.tokenizer.training import train_tokenizer

__all__ = [
    "ASSISTANT",
    "CHAT_TEMPLATE",
    "END_OF_TEXT",
    "END_OF_TURN",
    "FIM_MIDDLE",
    "FIM_PREFIX",
    "FIM_SUFFIX",
    "SPECIAL_TOKENS",
    "USER",
    "Tokenizer",
    "train_tokenizer",
]
