"""The special tokens of our own tokenizers, and the chat template made of them."""

from __future__ import annotations

import json

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
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- message['content'] ~ '\\n\\n' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '<|user|>' ~ message['content'] ~ '<|endofturn|>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<|assistant|>' ~ message['content'] ~ '<|endofturn|>' -}}"
    "{%- else -%}{{- raise_exception('unknown role ' ~ message['role']) -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""What other readers of the directory render; `hcx.tokenizer.chat.render_own` is the same thing on ids.

There is no system token: a system text stands before the turns as plain text with a blank line after it, as the
preamble in the prompts printed in the HyperCLOVA X report's appendix.
"""

_PREAMBLE_BEGIN = "{%- if not messages or messages[0]['role'] != 'system' -%}{{- "
_PREAMBLE_END = " -}}{%- endif -%}"


def chat_template(preamble: str = "") -> str:
    """Our template, for a model that was trained with a preamble: every conversation without a system text gets it."""
    if not preamble:
        return CHAT_TEMPLATE
    return _PREAMBLE_BEGIN + json.dumps(preamble + "\n\n", ensure_ascii=False) + _PREAMBLE_END + CHAT_TEMPLATE


def preamble_of(template: str) -> str | None:
    """The preamble of a template that `chat_template` made (empty: none); None for a foreign template."""
    opening = template.removesuffix(CHAT_TEMPLATE)
    if opening in ("", template):
        return None if opening else ""
    if not (opening.startswith(_PREAMBLE_BEGIN) and opening.endswith(_PREAMBLE_END)):
        return None
    try:
        text = json.loads(opening[len(_PREAMBLE_BEGIN) : -len(_PREAMBLE_END)])
    except ValueError:
        return None
    return text.removesuffix("\n\n") if isinstance(text, str) else None
