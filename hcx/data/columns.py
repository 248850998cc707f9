"""The doors of `pyarrow` and `datasets`: rows of Parquet files and of data sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hcx.data.source_config import DatasetsSource, ParquetSource, RowSource
from hcx.errors import DataError, MissingExtra, did_you_mean

_BATCH = 256


def _wanted(source: RowSource, there: list[str], where: str) -> list[str]:
    """The columns to read; the others of a wide table stay on disk."""
    fields = [source.field] if isinstance(source.field, str) else list(source.field)
    needed = [*fields, *source.where, *([source.group_by] if source.group_by else [])]
    for column in needed:
        if column not in there:
            raise DataError(f"{where}: no column {column!r}; {did_you_mean(column, there)}")
    extra = [source.name_field, source.split_field, "source", "licence"]
    return list(dict.fromkeys([*needed, *(column for column in extra if column in there)]))  # type: ignore[list-item]


def parquet_rows(source: ParquetSource, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a Parquet file.

    Raises:
        MissingExtra: `pyarrow` is not installed.
        DataError: not a Parquet file, a damaged one, or one without the column.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "text", "a source of kind parquet") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _wanted(source, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: row {number + 1}: not a Parquet file, or damaged: {error}") from None


def datasets_rows(source: DatasetsSource, folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a data set, streamed: nothing is copied into a cache.

    Raises:
        MissingExtra: `datasets` is not installed.
        DataError: the library cannot load it, or the split is one for testing.
    """
    if source.load_split.split("[")[0] in ("test", "eval"):
        raise DataError(
            f"datasets {source.name}: load_split = {source.load_split!r} is for evaluation and never trained on"
        )
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "text", "a source of kind datasets") from None
    files = [str(folder / name) for name in source.data_files]
    try:
        data = datasets.load_dataset(
            source.name,
            source.config,
            data_files=files or None,
            split=source.load_split,
            revision=source.revision,
            streaming=True,
        )
        columns: list[str] | None = None
        for number, row in enumerate(data, 1):
            if columns is None:
                columns = _wanted(source, list(row), f"datasets {source.name}")
            yield number, {column: row.get(column) for column in columns}
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its readers raise
        raise DataError(
            f"datasets {source.name}: cannot be loaded: {type(error).__name__}: {error}; check the name, and whether "
            "the hub can be reached (builders such as json with data_files need no network)"
        ) from None
