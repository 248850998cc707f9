"""What `hcx data build` is told: sources per language, shares, the split and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hcx.config import Config
from hcx.data.filters import FiltersConfig, QualityConfig
from hcx.data.source_config import (
    CodeSource,
    DatasetsSource,
    EmbeddedSource,
    JsonlSource,
    MegatronSource,
    ParquetSource,
    RowSource,
    Source,
    StdlibSource,
    TableSource,
    TextSource,
)
from hcx.tokenizer.recipe import Algorithm, PlainBpe

__all__ = [
    "CodeSource",
    "DataRecipe",
    "DatasetsSource",
    "EmbeddedSource",
    "ExistingTokenizer",
    "JsonlSource",
    "LanguageConfig",
    "MegatronSource",
    "ParquetSource",
    "RowSource",
    "Source",
    "StdlibSource",
    "TableSource",
    "TextSource",
    "TrainedTokenizer",
]


class LanguageConfig(Config):
    """One language (or code): where its text comes from and how much of training it gets."""

    share: float = Field(gt=0)
    """Share of training rows; the shares of all languages are scaled to sum to 1."""
    sources: tuple[Source, ...] = Field(min_length=1)
    """Read in this order; of equal documents the first is kept."""
    quality: QualityConfig | None = None
    """Limits beyond which a document is dropped; null: none. Each language has its own, for they differ."""


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
    """A directory with `tokenizer.json`, relative to the recipe's root."""


class DataRecipe(Config):
    """A data set: text to shards."""

    languages: dict[str, LanguageConfig] = Field(min_length=1)
    """By name; the names appear in metrics (`data/share/ko`)."""
    root: str | None = None
    """The directory that paths in the recipe are relative to, itself relative to the working directory; null: the
    recipe's own folder."""
    filters: FiltersConfig = FiltersConfig()
    """What is done to all text, stage by stage; by default exact de-duplication only."""
    tokenizer: Annotated[TrainedTokenizer | ExistingTokenizer, Field(discriminator="kind")] = TrainedTokenizer()
    """Trained on this text, or given."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Of the files of sources that have no split of their own; by hash of the file name."""
    min_document_characters: int = Field(default=1, ge=1)
    """Shorter documents are dropped."""
    seed: int = 1234
    """Orders the documents in the shards, and names the held-out files."""

    def folder(self, beside: str | Path) -> Path:
        """What relative paths are relative to, for a recipe that lies in the folder `beside`."""
        return Path(beside) if self.root is None else Path(self.root)

    @model_validator(mode="after")
    def _names_are_plain(self) -> DataRecipe:
        for name in self.languages:
            if not name.replace("_", "").isalnum() or not name.isascii():
                raise ValueError(f"languages: name {name!r}: use letters, digits and _ (it becomes a file name)")
        return self
