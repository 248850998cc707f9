"""The house model's card: what it is, what was measured of it, and what it can and cannot show."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hcx.artifacts import digest_file, read_manifest
from hcx.artifacts.durable import write_atomically
from hcx.artifacts.manifest import MANIFEST
from hcx.data import ShardSet
from hcx.data.kneser_ney import kneser_ney_baseline
from hcx.model.flops import parameter_count
from hcx.obs.machine import cpu_name
from hcx.recipe.house import VARIANTS, House, Reproduction, Variant
from hcx.recipe.infill import InfillFigures, measure_infilling
from hcx.recipe.quality import Estimate, measure_quality
from hcx.recipe.train import DataSection, TrainRecipe

CARD = "README.md"
FIGURES = "card.json"
LABELS: dict[Variant, str] = {"house": "house model", "plain": "plain BPE", "no-fim": "without FIM"}
LANGUAGES = {"ko": "Korean", "en": "English", "code": "code"}
WAYS = {"psm": "prefix-suffix-middle", "spm2": "suffix-prefix-middle", "left_to_right": "left to right"}


@dataclass(frozen=True)
class HouseFigures:
    """What the card states.

    Attributes:
        bits_per_byte: by variant and language, of held-out text.
        trigrams: the same of modified Kneser-Ney trigrams, by kind and language.
        bytes_per_token: by variant and language, of the same text.
        infilling: blanks of held-out text, of the variants that share a tokenizer's shards.
        facts: digests, counts, versions, machine.
        reproduction: the beginning trained again, if that was asked for.
    """

    bits_per_byte: dict[Variant, dict[str, Estimate]]
    trigrams: dict[str, dict[str, float]]
    bytes_per_token: dict[Variant, dict[str, float]]
    infilling: list[InfillFigures]
    facts: dict[str, Any]
    reproduction: Reproduction | None = None


def measure_house(house: House, variants: tuple[Variant, ...], reproduction: Reproduction | None) -> HouseFigures:
    """Scores the variants that were trained on held-out text and on blanks.

    Args:
        house: where they are.
        variants: which; the house model is the first.
        reproduction: what to state of it.
    """
    bits: dict[Variant, dict[str, Estimate]] = {}
    widths: dict[Variant, dict[str, float]] = {}
    recipe = house.train_recipe("house")
    for variant in variants:
        figures = measure_quality([(LABELS[variant], house.model(variant))], house.shards(variant), recipe.data.seq_len)
        bits[variant] = figures.models[0].bits_per_byte
        widths[variant] = {name: figures.num_bytes[name] / figures.tokens[name] for name in figures.tokens}
    baseline = kneser_ney_baseline(ShardSet.open(house.shards("house")))
    trigrams = {
        "trigram of its own language": {name: found["own"] for name, found in baseline.items()},
        "trigram of all text": {name: found["joint"] for name, found in baseline.items()},
    }
    asked = [(LABELS[variant], house.model(variant)) for variant in variants]
    infilling = measure_infilling(asked, house.shards("house"))
    return HouseFigures(bits, trigrams, widths, infilling, _facts(house, variants), reproduction)


def measured(house: House, variants: Iterable[Variant]) -> dict[str, str]:
    """The digests of the models that a card tells of: an unchanged set needs no new card."""
    return {variant: digest_file(house.model(variant) / MANIFEST) for variant in variants}


def stated_reproduction(house: House) -> Reproduction | None:
    """What the card that lies there says of training this very model's beginning again; None if nothing."""
    stated = _stated(house)
    try:
        same = stated["facts"]["measured"]["house"] == measured(house, ["house"])["house"]
        return Reproduction(**stated["reproduction"]) if same and stated["reproduction"] else None
    except (KeyError, TypeError):
        return None  # no card, or one of another hcx


def is_current(house: House, variants: Collection[Variant]) -> bool:
    """Whether the card that lies there tells of these very models."""
    if not (house.out / CARD).is_file():
        return False
    try:
        told = _stated(house)["facts"]["measured"]
    except (KeyError, TypeError):
        return False  # no figures, or those of another hcx: it is written anew
    return all(map(house.finished, variants)) and bool(told == measured(house, variants))


def _stated(house: House) -> Any:
    """The figures beside the card that lies there; an empty object where there are none, or they are cut off."""
    path = house.out / FIGURES
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        return {}


def _facts(house: House, variants: Iterable[Variant]) -> dict[str, Any]:
    model, shards = house.model("house"), house.shards("house")
    stated = read_manifest(model)
    recipe = house.train_recipe("house")
    return {
        "parameters": parameter_count(recipe.model),
        "trained_tokens": stated.counts["tokens"],
        "seed": recipe.seed,
        "infilling": _rearranged(recipe),
        "measured": measured(house, variants),
        "weights": {path.name: digest_file(path) for path in sorted(model.glob("*.safetensors"))},
        "shards": digest_file(shards / MANIFEST),
        "tokenizer": stated.counts["tokenizer_digest"],
        "producer": stated.producer,
        "created": stated.created,
        "torch": torch.__version__,
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _rearranged(recipe: TrainRecipe) -> str:
    fim = recipe.data.fim if isinstance(recipe.data, DataSection) else None
    if fim is None or fim.rate == 0:
        return "no text rearranged for infilling"
    short = "" if fim.longest_middle is None else f" with middles of up to {fim.longest_middle} characters"
    return f"{fim.rate:.0%} of the texts rearranged for infilling{short}"


def write_card(figures: HouseFigures, directory: Path) -> Path:
    """Writes the card for people and for scripts; returns the former."""
    write_atomically(directory / FIGURES, (json.dumps(asdict(figures), ensure_ascii=False, indent=1) + "\n").encode())
    write_atomically(directory / CARD, card_text(figures).encode())
    return directory / CARD


def card_text(figures: HouseFigures) -> str:
    """The card as Markdown, with the front matter that model hubs read."""
    parts = [_HEAD.format(**figures.facts), _quality(figures), _infilling(figures), _MEANING, _identity(figures)]
    return "\n".join(parts)


def _quality(figures: HouseFigures) -> str:
    languages = list(figures.bits_per_byte["house"])
    rows = [["", *(LANGUAGES.get(name, name) for name in languages)]]
    for variant, found in figures.bits_per_byte.items():
        cells = [f"{found[name].value:.3f} ({found[name].low:.3f} to {found[name].high:.3f})" for name in languages]
        rows.append([LABELS[variant], *cells])
    for kind, values in figures.trigrams.items():
        rows.append([kind, *(f"{values[name]:.3f}" for name in languages)])
    text = [
        "## Held-out text",
        "",
        "Bits per UTF-8 byte; lower is better. Intervals are over rows of held-out text, not over seeds of training.",
        "",
        _table(rows),
    ]
    for variant in VARIANTS[1:]:
        if variant in figures.bits_per_byte:
            text.append(_verdict(figures, variant, languages))
    return "\n".join(text)


def _verdict(figures: HouseFigures, variant: Variant, languages: list[str]) -> str:
    own, other = figures.bits_per_byte["house"], figures.bits_per_byte[variant]
    changes = []
    for name in languages:
        share = own[name].value / other[name].value - 1
        changes.append(f"{LANGUAGES.get(name, name)} {share:+.1%}")
    worse = [LANGUAGES.get(name, name) for name in languages if own[name].value >= other[name].value]
    verdict = f"not better in {', '.join(worse)}" if worse else "better in each language"
    return f"Against the same budget {_AGAINST[variant]}: {', '.join(changes)} bits per byte: {verdict}.\n"


def _infilling(figures: HouseFigures) -> str:
    rows = [["model", "asked", "words", *LANGUAGES.values()]]
    by_key: dict[tuple[str, str, int], dict[str, InfillFigures]] = {}
    for found in figures.infilling:
        by_key.setdefault((found.label, found.way, found.words), {})[found.language] = found
    for (label, way, words), cells in by_key.items():
        shown = []
        for name in LANGUAGES:
            cell = cells.get(name)
            if cell is None:
                shown.append("")
                continue
            value, low, high = cell.exact
            ends = "" if way == "left_to_right" else f", and ends {cell.ended:.1%}"
            shown.append(f"{value:.1%} ({low:.1%} to {high:.1%}){ends}; {cell.bits_per_byte:.2f}")
        rows.append([label, WAYS[way], str(words), *shown])
    count = max((found.count for found in figures.infilling), default=0)
    return f"""## Filling in held-out middles

Words cut out of up to {count} held-out texts per language: the share that greedy decoding writes exactly (95 %
interval), the share that it also ends there, and bits per byte of the middle. Left to right sees the prefix alone.

{_table(rows)}"""


def _identity(figures: HouseFigures) -> str:
    facts = figures.facts
    weights = "\n".join(f"- `{name}`: `{digest}`" for name, digest in facts["weights"].items())
    commit = facts["producer"].get("commit", "no commit")
    if figures.reproduction is None:
        again = "The beginning was not trained again (`hcx house-model --reproduce` does it)."
    elif figures.reproduction.equal:
        again = (
            f"The first {figures.reproduction.steps} steps were trained again from nothing on the same machine: every "
            "loss, gradient norm and sample id is the same, bit for bit."
        )
    else:
        again = (
            f"The first {figures.reproduction.steps} steps were trained again on the same machine and were NOT the "
            f"same: ledger segments {figures.reproduction.recorded} and {figures.reproduction.repeated}."
        )
    return f"""## Which one this is

{weights}
- shards: `{facts["shards"]}`, tokenizer: `{facts["tokenizer"]}`
- made {facts["created"]} by hcx {facts["producer"].get("version")} ({commit[:12]})
- on {facts["processor"]} with {facts["threads"]} threads, torch {facts["torch"]}

{again}
Another processor, thread count or torch release rounds otherwise, and so gives another model of the same quality.
"""


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)]) + "\n"


_AGAINST = {"plain": "with a tokenizer that knows no morphemes", "no-fim": "without rearranging text for infilling"}

_HEAD = """---
language: [ko, en]
library_name: transformers
tags: [hcx, fill-in-the-middle]
---
# The house model

{parameters:,} parameters, {trained_tokens:,} trained tokens: Korean, English and code in thirds,
{infilling}, one seed ({seed}). `make house-model` makes it on two CPU cores in about an hour.
"""

_MEANING = """## What it can and cannot show

It can show what a method does to a model that knows some Korean: by how much compression, a kernel's rounding, dropped
backward passes or an adapter change its bits per byte and its divergence, in each language by itself, with intervals.
Effects that need no large model (the tokenizer's, infilling's, quantization error's) show their direction here.

It cannot show knowledge, reasoning, instruction following, or anything at scale: ten million tokens are a
hundred-thousandth of what a real model reads. Its text is software documentation, interface messages, a dictionary
and source code, so figures on other Korean (news, conversation, poetry) measure distance of domain first. Multiple
choice is at chance. What holds at ten million parameters may not hold at a billion; say so where it is cited.
"""
