"""`hcx convert`: a checkpoint, any model directory or a GGUF file to a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("convert")(convert)


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="a model directory, a GGUF file or a checkpoint directory")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="new directory")],
    to: Annotated[
        str,
        typer.Option(
            help="hf: full precision, for transformers; hcx: the same with a manifest; peft: a checkpoint's adapter"
        ),
    ],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    adapter: Annotated[Path | None, typer.Option(help="adapter directory to merge into the model's weights")] = None,
) -> None:
    """Converts between formats; binary-coded weights, and those of GGUF files, are dequantized."""
    from hcx.errors import ConfigError, did_you_mean
    from hcx.recipe.convert import DTYPES, convert_adapter, convert_model

    kinds = ("hf", "hcx", "peft")
    if to not in kinds:
        raise ConfigError(f"--to {to}: {did_you_mean(to, kinds)}")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: {did_you_mean(dtype, DTYPES)}")
    if to == "peft":
        if adapter is not None:
            raise ConfigError("--adapter is merged into a model's weights: it goes with --to hf or hcx")
        convert_adapter(source, destination, DTYPES[dtype])
        echo(f"adapter: {destination}")
        return
    convert_model(source, destination, DTYPES[dtype], manifest=to == "hcx", adapter=adapter)
    echo(f"model: {destination}")
