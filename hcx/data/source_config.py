"""The kinds of sources that a data recipe can name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from hcx.config import Config
from hcx.data.mixture import MAX_UPSAMPLE


class AnySource(Config):
    """What every kind of source has."""

    max_bytes: int | None = Field(default=None, gt=0)
    """Stop before the training text exceeds this many UTF-8 bytes; null: all."""
    upsample: float = Field(default=1.0, gt=0, le=MAX_UPSAMPLE)
    """How often a document of this source comes in one epoch of its language, on average: above 1 for sources that
    hold knowledge, below 1 for those of which a part is enough."""


class EmbeddedSource(AnySource):
    """Text that ships with hcx (Korean or English documentation); its split is fixed."""

    kind: Literal["embedded"] = "embedded"
    language: Literal["ko", "en"]
    """Which of the shipped texts."""


class StdlibSource(AnySource):
    """The Python standard library of the interpreter that builds the shards."""

    kind: Literal["stdlib"] = "stdlib"
    max_bytes: int | None = Field(default=3_000_000, gt=0)
    """Stop before the training text exceeds this many UTF-8 bytes; null: all."""


class RowSource(AnySource):
    """What sources of rows with named fields have.

    A row's `split` decides where it goes: `train`; `validation`, `valid`, `val` or `dev` are held out; any other value
    is kept for evaluation and goes into no shard.
    """

    field: str | tuple[str, ...] = "text"
    """The key of the text; of several keys the texts are joined by line feeds."""
    name_field: str = "file"
    """The key of the document's file, whole files going to one split; rows without it are files of their own."""
    split_field: str | None = "split"
    """The key of the split; rows without it are divided by the hash of their name. Null: no key is looked at."""
    where: dict[str, Any] = Field(default_factory=dict)
    """Only rows in which these keys have these values."""
    group_by: str | None = None
    """A key: neighbouring rows that have the same value are one document, a row to a line (short reviews of one
    film)."""
    group_characters: int = Field(default=4000, gt=0)
    """A grouped document ends before it is longer than this."""
    licence: str | None = None
    """Licence of the rows that have no `licence` key."""


class JsonlSource(RowSource):
    """JSON lines, one object per row; `.gz` and `.xz` are unpacked."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """A file or a glob pattern, relative to the recipe's root."""


class TableSource(RowSource):
    """Tables with one line of headings; `.gz` and `.xz` are unpacked."""

    kind: Literal["table"] = "table"
    path: str
    """A file or a glob pattern, relative to the recipe's root."""
    dialect: Literal["tsv", "csv"] = "tsv"
    """`tsv`: cells end at tabs and lines, quotes mean nothing; `csv`: commas, and quotes as in RFC 4180."""


class ParquetSource(RowSource):
    """Parquet files, read a row group at a time (extra `text`)."""

    kind: Literal["parquet"] = "parquet"
    path: str
    """A file or a glob pattern, relative to the recipe's root."""


class DatasetsSource(RowSource):
    """A data set that the `datasets` library loads (extra `text`): a name on the hub, or a builder with local files."""

    kind: Literal["datasets"] = "datasets"
    name: str
    """As `datasets.load_dataset` takes it: `OWNER/NAME`, or `json`, `parquet`, `text`, `csv` with `data_files`."""
    config: str | None = None
    """The data set's configuration."""
    revision: str | None = None
    """Commit of the data set on the hub; without one tomorrow's build may differ."""
    load_split: str = "train"
    """Which of the data set's splits is read. Splits for testing are refused."""
    data_files: tuple[str, ...] = ()
    """Files of a builder, relative to the recipe's root."""


class TextSource(AnySource):
    """Plain UTF-8 files, one document each."""

    kind: Literal["text"] = "text"
    path: str
    """A file or a glob pattern, relative to the recipe's root."""


class CodeSource(AnySource):
    """A tree of source files. Hidden folders and those of other people's code are left out."""

    kind: Literal["code"] = "code"
    path: str
    """The folder, relative to the recipe's root."""
    suffixes: tuple[str, ...] = Field(default=(".py",), min_length=1)
    """Endings of the files to read."""
    skip: tuple[str, ...] = ()
    """Names of more folders to leave out."""
    licences: tuple[str, ...] | None = None
    """Only files under these licences (SPDX names, as found in the nearest licence file above each); null: any."""
    characters: tuple[int, int] = (200, 100_000)
    """Fewest and most characters of a file."""


class MegatronSource(AnySource):
    """A Megatron `.bin`/`.idx` pair made elsewhere, decoded to text; then it is treated like any other text."""

    kind: Literal["megatron"] = "megatron"
    path: str
    """The pair without its endings, relative to the recipe's root."""
    tokenizer: str
    """The directory of the tokenizer that made it, relative to the recipe's root."""


Source = Annotated[
    EmbeddedSource
    | StdlibSource
    | JsonlSource
    | TableSource
    | ParquetSource
    | DatasetsSource
    | TextSource
    | CodeSource
    | MegatronSource,
    Field(discriminator="kind"),
]
