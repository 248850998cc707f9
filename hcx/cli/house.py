"""`hcx house-model`: the small Korean, English and code model that claims about Korean are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo, table


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("house-model")(house_model)


def house_model(
    out: Annotated[Path, typer.Option(help="the model's run; what it is compared with lies beside it")] = Path(
        "runs/house"
    ),
    text: Annotated[Path, typer.Option(help="the permissive text; fetched if it is not there")] = Path(
        "data/permissive"
    ),
    compare: Annotated[
        bool, typer.Option("--compare", help="also train, on the same budget, with plain BPE and without FIM")
    ] = False,
    reproduce: Annotated[
        bool, typer.Option("--reproduce", help="also train the first steps again and compare every bit")
    ] = False,
) -> int:
    """Text, tokenizer, shards, an hour of training, and a card. What exists from the same recipes is kept."""
    from hcx.cli.main import EXIT_RESUMABLE
    from hcx.recipe.house import VARIANTS, House
    from hcx.report.house_card import (
        CARD,
        LABELS,
        LANGUAGES,
        is_current,
        measure_house,
        stated_reproduction,
        write_card,
    )

    house = House(out, text)
    variants = VARIANTS if compare else VARIANTS[:1]
    for variant in variants:
        if not house.make(variant):
            echo(f"interrupted; the same command goes on with {LABELS[variant]}")
            return EXIT_RESUMABLE
    repeated = house.reproduce() if reproduce else None
    made = tuple(variant for variant in VARIANTS if variant in variants or house.finished(variant))
    if repeated is None and is_current(house, made):
        echo(f"nothing to do: {house.model('house')} and {out / CARD} are of these recipes")
        return 0
    figures = measure_house(house, made, repeated or stated_reproduction(house))
    card = write_card(figures, out)
    rows = [
        (LABELS[variant], *(f"{found[name].value:.3f}" for name in LANGUAGES))
        for variant, found in figures.bits_per_byte.items()
    ]
    rows += [(kind, *(f"{values[name]:.3f}" for name in LANGUAGES)) for kind, values in figures.trigrams.items()]
    table("held-out bits per byte", ("", *LANGUAGES.values()), rows)
    if repeated is not None:
        verdict = "equal, bit for bit" if repeated.equal else f"NOT equal: {repeated.recorded}, {repeated.repeated}"
        echo(f"the first {repeated.steps} steps trained again: {verdict}")
    echo(f"model: {house.model('house')}   card: {card}")
    return 0 if repeated is None or repeated.equal else 1
