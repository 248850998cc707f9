"""The pre-split patterns: those that llama.cpp knows by name, so that ids are the same there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """How text is cut before merges apply.

    Attributes:
        regex: in the syntax of the `tokenizers` library; every character of a text lies in exactly one match.
        llama_cpp: the value of `tokenizer.ggml.pre` under which llama.cpp cuts in the same way.
        ignore_merges: whether a piece that is a token as a whole is taken as that token without asking the merges.
            Not a choice: llama.cpp ties it to the name, and `tokenizer.json` must say the same.
    """

    regex: str
    llama_cpp: str
    ignore_merges: bool


def _regex(digits: str) -> str:
    return "|".join(
        (
            # Llama 3's own file writes (?i:'s|...). Under case folding that also takes the long s (U+017F), which
            # llama.cpp does not; spelled out, both cut alike.
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
            r"[^\r\n\p{L}\p{N}]?\p{L}+",
            digits,
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )


PATTERNS = {
    "llama3": Pattern(_regex(r"\p{N}{1,3}"), llama_cpp="llama-bpe", ignore_merges=True),
    "qwen2": Pattern(_regex(r"\p{N}"), llama_cpp="qwen2", ignore_merges=False),
}
"""`llama3` keeps up to three digits together; `qwen2` is the same with every digit alone."""
