"""The special tokens of our own tokenizers, and the chat template made of them."""

from __future__ import annotations

END_OF_TEXT = "<|endoftext|>"
"""Ends every document; the context of a document's first token; also the padding token."""
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END_OF_TURN = "<|endofturn|>"
FIM_PREFIX = "<|fim_prefix|>"
FIM_SUFFIX = "<|fim_suffix|>"
FIM_MIDDLE = "<|fim_middle|>"

NUM_SPARE = 64
"""Tokens that text never produces: later work names them without touching the embedding matrix's shape."""
VOCAB_MULTIPLE = 128
"""Vocabularies are a multiple of this: it keeps the output matrix divisible by every tensor-parallel size in use."""


def spare(number: int) -> str:
    """The `number`-th spare token."""
    return f"<|spare_{number}|>"


SPECIAL_TOKENS: tuple[str, ...] = (
    END_OF_TEXT,
    USER,
    ASSISTANT,
    END_OF_TURN,
    FIM_PREFIX,
    FIM_SUFFIX,
    FIM_MIDDLE,
    *(spare(number) for number in range(NUM_SPARE)),
)
"""In the order of their ids, which start at 0."""

CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set ns.system = ns.system ~ message['content'] ~ '\\n\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<|user|>' ~ ns.system ~ message['content'] ~ '<|endofturn|>' -}}{%- set ns.system = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' ~ message['content'] ~ '<|endofturn|>' -}}"
    "{%- else -%}{{- raise_exception('unknown role ' ~ message['role']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""What other readers of the directory render; `hcx.tokenizer.chat.render_own` is the same thing on ids.

There is no system token: system text opens the user turn that follows it.
"""
