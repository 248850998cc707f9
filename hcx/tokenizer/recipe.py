"""What `hcx tokenizer train` is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hcx.config import Config


class TokenizerRecipe(Config):
    """A tokenizer and the text it learns from."""

    vocab_size: int
    """Number of ids, special tokens included; a multiple of 128."""
    pattern: Literal["llama3"] = "llama3"
    """The pre-split pattern."""
    data: str
    """A data recipe whose training text it learns from: a path relative to this recipe, or a name such as
    `launch/data/demo.yaml` of a recipe that ships with hcx."""
    max_bytes_per_language: int = Field(default=20_000_000, gt=0)
    """Learn from at most so many bytes of each language, so that a large language does not take all merges."""
