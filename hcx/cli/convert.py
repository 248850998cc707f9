"""`hcx convert`: a checkpoint or any model directory to a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("convert")(convert)


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="a model directory or a checkpoint directory")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="new directory")],
    to: Annotated[str, typer.Option(help="hf: full precision, loads in transformers; hcx: the same with a manifest")],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
) -> None:
    """Converts between formats; binary-coded weights are dequantized."""
    from hcx.errors import ConfigError, did_you_mean
    from hcx.recipe.convert import convert_model
    from hcx.recipe.run import DTYPES

    if to not in ("hf", "hcx"):
        raise ConfigError(f"--to {to}: {did_you_mean(to, ('hf', 'hcx'))}")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: {did_you_mean(dtype, DTYPES)}")
    convert_model(source, destination, DTYPES[dtype], manifest=to == "hcx")
    echo(f"model: {destination}")
