"""`hcx tokenizer`: train a tokenizer, and compare tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo, print_json, table


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
            training_texts(texts, config.max_bytes_per_language), config.vocab_size, config.pattern
        )
        tokenizer.save(artifact.path)
        artifact.counts.update(vocab_size=tokenizer.vocab_size, digest=tokenizer.digest)
    echo(f"{out}: {tokenizer.vocab_size} ids, {tokenizer.digest}")


def report(
    tokenizers: Annotated[list[Path], typer.Argument(help="Directories with a tokenizer.json.")],
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text files to measure on (repeat for more).")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON rows, for scripts.")] = False,
) -> None:
    """Bytes per token of tokenizers on texts; higher is more compact."""
    from hcx.errors import DataError
    from hcx.tokenizer.report import tokenizer_report

    contents = []
    for path in text:
        try:
            contents.append((str(path), path.read_bytes().decode("utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a readable UTF-8 file: {error}") from None
    rows = tokenizer_report(tokenizers, contents)
    if as_json:
        print_json([row.to_json() for row in rows])
        return
    table(
        "",
        ["tokenizer", "ids", "text", "bytes", "tokens", "bytes/token", "characters/token", "lossless"],
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
