"""What `hcx tokenizer train` is told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hcx.config import Config


class PlainBpe(Config):
    """Byte-level BPE, learnt by the `tokenizers` library."""

    kind: Literal["bpe"] = "bpe"


class MorphemeBpe(Config):
    """Byte-level BPE, learnt by SentencePiece inside the pieces that a Korean analyser finds.

    The analyser is asked while learning only; encoding needs the learned merges alone.
    """

    kind: Literal["morpheme-bpe"] = "morpheme-bpe"
    granularity: Literal["none", "fine", "coarse"] = "coarse"
    """`fine`: every morpheme is a piece. `coarse`: a stem and its tail of particles or endings are the pieces.
    `none`: no analyser; the same trainer without boundaries, for comparisons."""
    crossing: float = Field(default=0.2, ge=0, le=1)
    """How much an occurrence counts towards a merge across a boundary; inside a piece it counts 1. 0: nothing crosses;
    with a large vocabulary that costs every sixth byte per token, because the commonest words cannot become tokens.
    1: as if there were no boundaries."""
    space_runs: int = Field(default=0, ge=0, le=64)
    """Every run of 2 to this many spaces is one token, for indented code; 0: only the runs that the text teaches."""
    max_piece_bytes: int = Field(default=64, ge=4)
    """Longest token, in bytes; a Hangul syllable has three."""


Algorithm = Annotated[PlainBpe | MorphemeBpe, Field(discriminator="kind")]


class TokenizerRecipe(Config):
    """A tokenizer and the text it learns from."""

    vocab_size: int
    """Number of ids, special tokens included; a multiple of 128."""
    pattern: Literal["llama3", "qwen2"] = "llama3"
    """The pre-split pattern: `llama3` keeps up to three digits together, `qwen2` is the same with every digit alone."""
    algorithm: Algorithm = PlainBpe()
    """How merges are learnt."""
    data: str
    """A data recipe whose training text it learns from: a path relative to this recipe, or a name such as
    `launch/data/demo.yaml` of a recipe that ships with hcx."""
    max_bytes_per_language: int = Field(default=20_000_000, gt=0)
    """Learn from at most so many bytes of each language, so that a large language does not take all merges."""
