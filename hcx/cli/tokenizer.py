"""`hcx tokenizer`: train a tokenizer, and compare tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo, print_json, table

HELD_OUT = "held-out:"
"""Before a language: the held-out text of the shipped data recipe."""


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    group = typer.Typer(help="Train a tokenizer, and compare tokenizers.", no_args_is_help=True)
    app.add_typer(group, name="tokenizer")
    group.command("train")(train)
    group.command("report")(report)


def train(
    recipe: Annotated[Path, typer.Argument(help="A tokenizer recipe (YAML), such as tokenizer/demo.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    out: Annotated[Path, typer.Option("--out", help="The directory to make.")] = Path("tokenizer-out"),
) -> None:
    """Learn a byte-level BPE tokenizer; the directory loads in transformers as it is."""
    from hcx.artifacts import artifact_input, new_artifact
    from hcx.cli.data import recipe_path
    from hcx.config import load_config
    from hcx.data.build import read_texts, training_texts
    from hcx.data.recipe import DataRecipe
    from hcx.tokenizer import train_tokenizer
    from hcx.tokenizer.recipe import TokenizerRecipe

    path = recipe_path(recipe)
    config = load_config(TokenizerRecipe, path, overrides or [])
    data_path = recipe_path(Path(config.data), path.parent)
    texts = read_texts(load_config(DataRecipe, data_path), data_path.parent)
    with new_artifact(out, "tokenizer", config, [artifact_input("text", data_path)]) as artifact:
        tokenizer = train_tokenizer(
            training_texts(texts, config.max_bytes_per_language), config.vocab_size, config.pattern, config.algorithm
        )
        tokenizer.save(artifact.path)
        artifact.counts.update(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest)
    echo(f"{out}: {tokenizer.vocab_size} ids, {tokenizer.digest}")


def report(
    tokenizers: Annotated[list[Path], typer.Argument(help="Directories with a tokenizer.json.")],
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="UTF-8 files, or held-out:ko, held-out:en, held-out:code (repeat for more)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON rows, for scripts.")] = False,
) -> None:
    """Bytes per token of tokenizers on texts; higher is more compact.

    Without --text, on the held-out Korean, English and code of the shipped data recipe.
    """
    from hcx.tokenizer.report import tokenizer_report

    rows = tokenizer_report(tokenizers, _texts(text or [HELD_OUT + name for name in ("ko", "en", "code")]))
    if as_json:
        print_json([row.to_json() for row in rows])
        return
    table(
        "",
        ["tokenizer", "ids", "text", "bytes", "tokens", "bytes/token", "chars/token", "lossless"],
        [
            (
                row.tokenizer,
                row.vocab_size,
                row.text,
                row.num_bytes,
                row.tokens,
                f"{row.bytes_per_token:.3f}",
                f"{row.characters_per_token:.3f}",
                "yes" if row.lossless else "no",
            )
            for row in rows
        ],
    )


def _texts(names: list[str]) -> list[tuple[str, str]]:
    from hcx.errors import DataError

    contents = []
    held_out: dict[str, str] = {}
    for name in names:
        if name.startswith(HELD_OUT):
            held_out = held_out or _held_out()
            language = name.removeprefix(HELD_OUT)
            if language not in held_out:
                raise DataError(f"--text {name}: valid: {', '.join(HELD_OUT + known for known in held_out)}")
            contents.append((name, held_out[language]))
            continue
        try:
            contents.append((name, Path(name).read_bytes().decode("utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{name}: not a readable UTF-8 file: {error}") from None
    return contents


def _held_out() -> dict[str, str]:
    """language -> the held-out documents of the shipped data recipe, joined."""
    from hcx.artifacts import find_resource
    from hcx.config import load_config
    from hcx.data.build import read_texts
    from hcx.data.recipe import DataRecipe

    path = find_resource("launch/data/demo.yaml")
    texts = read_texts(load_config(DataRecipe, path), path.parent)
    return {name: "\n".join(d.text for d in text.documents["validation"]) for name, text in texts.items()}
