"""What `hcx data build` is told: sources per language, shares, the split and the tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hcx.config import Config
from hcx.tokenizer.recipe import Algorithm, PlainBpe


class EmbeddedSource(Config):
    """Text that ships with hcx (Korean or English documentation); its split is fixed."""

    kind: Literal["embedded"] = "embedded"
    language: Literal["ko", "en"]
    """Which of the shipped texts."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Stop before the training text exceeds this many UTF-8 bytes; null: all."""


class StdlibSource(Config):
    """The Python standard library of the interpreter that builds the shards."""

    kind: Literal["stdlib"] = "stdlib"
    max_bytes: int | None = Field(default=3_000_000, gt=0)
    """Stop before the training text exceeds this many UTF-8 bytes; null: all."""


class JsonlSource(Config):
    """JSON lines, one object per document; `.gz` and `.xz` are unpacked."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """A file or a glob pattern, relative to the recipe's folder."""
    field: str = "text"
    """The key of the text."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Stop before the training text exceeds this many UTF-8 bytes; null: all."""


class TextSource(Config):
    """Plain UTF-8 files, one document each."""

    kind: Literal["text"] = "text"
    path: str
    """A file or a glob pattern, relative to the recipe's folder."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Stop before the training text exceeds this many UTF-8 bytes; null: all."""


class MegatronSource(Config):
    """A Megatron `.bin`/`.idx` pair made elsewhere, decoded to text; then it is treated like any other text."""

    kind: Literal["megatron"] = "megatron"
    path: str
    """The pair without its endings, relative to the recipe's folder."""
    tokenizer: str
    """The directory of the tokenizer that made it, relative to the recipe's folder."""
    max_bytes: int | None = Field(default=None, gt=0)
    """Stop before the training text exceeds this many UTF-8 bytes; null: all."""


Source = Annotated[
    EmbeddedSource | StdlibSource | JsonlSource | TextSource | MegatronSource, Field(discriminator="kind")
]


class LanguageConfig(Config):
    """One language (or code): where its text comes from and how much of training it gets."""

    share: float = Field(gt=0)
    """Share of training rows; the shares of all languages are scaled to sum to 1."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """Read in this order; of equal documents the first is kept."""


class TrainedTokenizer(Config):
    """Learn a byte-level BPE tokenizer from the training text."""

    kind: Literal["train"] = "train"
    vocab_size: int = 4096
    """Number of ids, special tokens included; a multiple of 128."""
    pattern: Literal["llama3", "qwen2"] = "llama3"
    """The pre-split pattern: `llama3` keeps up to three digits together, `qwen2` is the same with every digit alone."""
    algorithm: Algorithm = PlainBpe()
    """How merges are learnt."""
    max_bytes_per_language: int = Field(default=20_000_000, gt=0)
    """Learn from at most so many bytes of each language."""


class ExistingTokenizer(Config):
    """Use a tokenizer that exists."""

    kind: Literal["directory"] = "directory"
    path: str
    """A directory with `tokenizer.json`, relative to the recipe's folder."""


class DataRecipe(Config):
    """A data set: text to shards."""

    languages: dict[str, LanguageConfig] = Field(min_length=1)
    """By name; the names appear in metrics (`data/share/ko`)."""
    tokenizer: Annotated[TrainedTokenizer | ExistingTokenizer, Field(discriminator="kind")] = TrainedTokenizer()
    """Trained on this text, or given."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Of the files of sources that have no split of their own; by hash of the file name."""
    min_document_characters: int = Field(default=1, ge=1)
    """Shorter documents are dropped."""
    seed: int = 1234
    """Orders the documents in the shards, and names the held-out files."""

    @model_validator(mode="after")
    def _names_are_plain(self) -> DataRecipe:
        for name in self.languages:
            if not name.replace("_", "").isalnum() or not name.isascii():
                raise ValueError(f"languages: name {name!r}: use letters, digits and _ (it becomes a file name)")
        return self
