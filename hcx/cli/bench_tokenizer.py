"""`hcx bench tokenizer`: encoding speed beside the libraries that others encode with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcx.cli.output import echo, table, write_rows

if TYPE_CHECKING:
    from hcx.tokenizer import Tokenizer


def tokenizer(
    directory: Annotated[
        Path | None, typer.Argument(help="A tokenizer of hcx; without one, 16,000 ids are learnt from shipped text.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a little of one text, few rounds")] = False,
    rounds: Annotated[int, typer.Option(help="measured rounds per text")] = 15,
    out: Annotated[Path | None, typer.Option(help="CSV file that rows are appended to")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """Encoding speed beside tokenizers, tiktoken and sentencepiece, on the same text and vocabulary."""
    from hcx.errors import ConfigError
    from hcx.obs import get_logger
    from hcx.recipe.bench_tokenizer import Mode, TokenizerRow, measure_encoding
    from hcx.tokenizer import Tokenizer

    if rounds < 5:
        raise ConfigError(f"--rounds {rounds}: an interval needs at least 5")
    texts = _documents()
    measured = Tokenizer.load(directory) if directory is not None else _learn(texts)
    held_out = {name: documents for name, (_, documents) in texts.items()}
    if quick:
        held_out = {"ko": held_out["ko"][:20]}
    rows: list[TokenizerRow] = []
    modes: tuple[Mode, ...] = ("one by one", "batch")
    for mode in modes:
        get_logger(__name__).info("encoding %s", mode)
        rows += measure_encoding(measured, held_out, mode, 5 if quick else rounds)
    if not write_rows([row.as_dict() for row in rows], out, as_json):
        return
    table(
        "encoding, MB per second; a ratio above 1 means that hcx is faster",
        ("text", "documents", "library", "MB/s", "ratio", "95 % interval", "same ids"),
        [
            (
                row.text,
                row.mode,
                f"{row.library} {row.version}",
                f"{row.mb_per_s:.2f}",
                f"{row.ratio:.3f}",
                f"{row.ratio_low:.3f} to {row.ratio_high:.3f}",
                "yes" if row.same_ids else "no",
            )
            for row in rows
        ],
    )
    echo(f"{rows[0].device}, {rows[-1].threads} threads in batches, vocabulary of {rows[0].vocab_size}")


def _documents() -> dict[str, tuple[list[str], list[str]]]:
    """language -> (training, held-out) documents of the shipped data recipe."""
    from hcx.artifacts import find_resource
    from hcx.config import load_config
    from hcx.data.build import read_texts
    from hcx.data.recipe import DataRecipe

    path = find_resource("launch/data/demo.yaml")
    found = read_texts(load_config(DataRecipe, path), path.parent)
    return {
        name: ([d.text for d in text.documents["train"]], [d.text for d in text.documents["validation"]])
        for name, text in found.items()
    }


def _learn(texts: dict[str, tuple[list[str], list[str]]]) -> Tokenizer:
    import importlib.util

    from hcx.tokenizer import train_tokenizer
    from hcx.tokenizer.recipe import MorphemeBpe

    # Without an analyser: how merges were learnt makes no difference to how fast they are applied.
    has_trainer = importlib.util.find_spec("sentencepiece") is not None
    algorithm = MorphemeBpe(granularity="none", space_runs=16) if has_trainer else None
    return train_tokenizer((text for learnt, _ in texts.values() for text in learnt), 16000, algorithm=algorithm)
