"""`hcx bench compress`: what compression costs, beside other libraries' quantizers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcx.cli.output import echo, keep_rows, table, write_rows

if TYPE_CHECKING:
    from hcx.recipe.bench_compress import CompressRow


def compress(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="full-precision model directory")],
    shards: Annotated[
        Path | None,
        typer.Option(help="shards of the model's tokenizer; those MODEL was trained on if absent"),
    ] = None,
    bits: Annotated[str, typer.Option(help="planes, comma-separated; such as 2.5 with bcq-mixed")] = "4,3,2",
    group_size: Annotated[int, typer.Option("--group-size", help="of the other libraries; ours follow from it")] = 64,
    methods: Annotated[
        str, typer.Option(help="ours, comma-separated: bcq, bcq-offset, bcq-mixed, bcq-nested, ...")
    ] = "bcq,bcq-offset",
    peers: Annotated[
        str | None, typer.Option(help="rtn, hqq, hqq-axis0, gptq, gptq-actorder; all that are installed if absent")
    ] = None,
    tokens: Annotated[int, typer.Option(help="of calibration text")] = 131_072,
    shares: Annotated[
        str | None, typer.Option(help="of calibration text, such as ko=0.4,en=0.4,code=0.2; the shards' if absent")
    ] = None,
    max_documents: Annotated[
        str | None, typer.Option(help="scored per language: one number, or such as ko=20,en=40,code=10")
    ] = None,
    by: Annotated[str, typer.Option(help="what bcq-mixed gives planes to: layer, type or matrix")] = "layer",
    sensitivity_documents: Annotated[
        int, typer.Option("--sensitivity-documents", help="that bcq-mixed reads per language, behind those scored")
    ] = 16,
    sensitivity_rows: Annotated[
        int | None, typer.Option("--sensitivity-rows", help="of those documents, spread evenly; all if absent")
    ] = None,
    sensitivity_objective: Annotated[
        str, typer.Option("--sensitivity-objective", help="loss, or divergence from full precision")
    ] = "loss",
    sensitivities: Annotated[
        Path | None, typer.Option(help="JSON file that keeps what bcq-mixed read; read from there if it exists")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="3 bits, little text")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV file that rows are appended to")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
) -> None:
    """KL divergence and bits per byte of our quantizers and others', at equal or fewer bytes, on held-out text."""
    from hcx.cli.compress import training_shards
    from hcx.compress import Calibration
    from hcx.config.decode import decode
    from hcx.errors import ConfigError
    from hcx.recipe.allocation import Reading
    from hcx.recipe.bench_compress import measure
    from hcx.recipe.compress_peers import find_peers

    try:
        widths = [float(part) for part in bits.split(",")]
        split = [part.partition("=") for part in (shares or "").split(",") if part]
        given = {name: float(value) for name, _, value in split}
    except ValueError:
        raise ConfigError(f"--bits {bits}, --shares {shares}: expected 4,3,2.5 and ko=0.4,en=0.6") from None
    scored = _documents(max_documents)
    if min(sensitivity_documents, 1 if sensitivity_rows is None else sensitivity_rows) < 1:
        raise ConfigError(
            f"--sensitivity-documents {sensitivity_documents}, --sensitivity-rows {sensitivity_rows}: at least 1 each"
        )
    if sensitivity_objective not in ("loss", "divergence"):
        raise ConfigError(f"--sensitivity-objective {sensitivity_objective}: loss or divergence")
    if not widths or not all(1 <= width <= 8 for width in widths) or group_size < 8:
        raise ConfigError(f"--bits {bits}, --group-size {group_size}: 1 to 8 bits, groups of at least 8")
    if quick:
        widths, tokens = widths[1:2] or widths, min(tokens, 8192)
        if isinstance(scored, dict):
            scored = {language: min(number, 8) for language, number in scored.items()}
        else:
            scored = min(scored or 8, 8)
    settings = decode(Calibration, {"tokens": tokens, "shares": given}, "the command line")
    names = [name for name in peers.split(",") if name] if peers is not None else None
    measured = measure(
        model,
        shards or training_shards(model),
        widths,
        [name for name in methods.split(",") if name],
        find_peers(names),
        group_size,
        settings,
        max_documents=scored,
        by=by,
        reading=Reading(sensitivity_objective, sensitivity_documents, sensitivity_rows),  # type: ignore[arg-type]
        sensitivities=sensitivities,
    )
    rows = keep_rows(measured, out, lambda row: row.as_dict())
    if not write_rows([row.as_dict() for row in rows], None, as_json):
        return
    for width, language in dict.fromkeys((row.bits, row.language) for row in rows):
        own = [row for row in rows if (row.bits, row.language) == (width, language)]
        table(
            f"{width:g} bits, {language}: {own[0].tokens:,} held-out tokens, "
            f"full precision {own[0].bits_per_byte_full:.4f} bits per byte",
            ("contender", "group", "bits per weight", "KL (nats per token)", "less ours", "bits per byte", "less ours"),
            [
                (
                    row.contender,
                    row.group_size,
                    f"{row.bits_per_weight:.3f}",
                    f"{row.kl:.4f} ({row.kl_low:.4f} to {row.kl_high:.4f})",
                    _excess(row, "kl"),
                    f"{row.bits_per_byte:.4f}",
                    _excess(row, "bits_per_byte"),
                )
                for row in sorted(own, key=lambda row: row.kl)
            ],
        )
    echo(f"calibrated on {rows[0].calibration_tokens:,} tokens of training text, in one pass over full precision")


def _documents(given: str | None) -> int | dict[str, int] | None:
    from hcx.errors import ConfigError

    if given is None:
        return None
    try:
        parts = [part.partition("=") for part in given.split(",")]
        numbers = {name: int(value) for name, _, value in parts} if "=" in given else int(given)
    except ValueError:
        numbers = 0
    if min(numbers.values() if isinstance(numbers, dict) else [numbers]) < 1:
        raise ConfigError(f"--max-documents {given}: expected a number of at least 1, or ko=20,en=40,code=10")
    return numbers


def _excess(row: CompressRow, of: str) -> str:
    value, low, high = (getattr(row, f"{of}_excess{end}") for end in ("", "_low", "_high"))
    return f"{value:+.4f} ({low:+.4f} to {high:+.4f})"
