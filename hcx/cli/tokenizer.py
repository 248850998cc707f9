"""`hcx tokenizer`: train a tokenizer, and compare tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcx.cli.output import echo, print_json, table

if TYPE_CHECKING:
    from hcx.report.tokenizers import TokenizerReport
    from hcx.tokenizer.report import ReportRow, Text

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
    from hcx.tokenizer.training import learning_packages

    path = recipe_path(recipe, shipped="tokenizer")
    config = load_config(TokenizerRecipe, path, overrides or [])
    data_path = recipe_path(Path(config.data), path.parent)
    texts = read_texts(load_config(DataRecipe, data_path), data_path.parent)
    with new_artifact(out, "tokenizer", config, [artifact_input("text", data_path)]) as artifact:
        tokenizer = train_tokenizer(
            training_texts(texts, config.max_bytes_per_language), config.vocab_size, config.pattern, config.algorithm
        )
        tokenizer.save(artifact.path)
        artifact.counts.update(
            vocab_size=tokenizer.vocab_size, digest=tokenizer.digest, learnt_with=learning_packages(config.algorithm)
        )
    echo(f"{out}: {tokenizer.vocab_size} ids, {tokenizer.digest}")


def report(
    tokenizers: Annotated[
        list[str] | None,
        typer.Argument(
            help="A folder with tokenizer.json, a *.tiktoken, *.gguf, tekken*.json or *.model file, or package:NAME."
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="UTF-8 files, or held-out:ko, held-out:en, held-out:code (repeat for more)."),
    ] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Beside them, every peer tokenizer that is installed.")
    ] = False,
    packages: Annotated[
        Path | None, typer.Option("--from", help="Look for peers in this folder of unpacked packages instead.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write a page and report.json there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON, for scripts.")] = False,
) -> None:
    """Compare tokenizers: bytes per token, tokens per Hangul syllable, boundaries of Korean morphemes.

    Without --text, on the held-out Korean, English and code of the shipped data recipe; and, where the evaluation sets
    are (folder HCX_SHARED_DATA), on text of other kinds and against two treebanks.
    """
    from hcx.errors import ConfigError
    from hcx.report.tokenizers import TokenizerReport, write_tokenizer_report
    from hcx.tokenizer.evaluation_text import VARIABLE, evaluation_folder, out_of_domain_texts, treebanks
    from hcx.tokenizer.gold import GoldSentence, analysed
    from hcx.tokenizer.morphemes import independent_analyser
    from hcx.tokenizer.peers import PACKAGE, PEERS, find_peer, load_measured
    from hcx.tokenizer.report import boundary_report, tokenizer_report

    unavailable: list[str] = []
    names = list(tokenizers or [])
    if peers or packages is not None:
        for name, peer in PEERS.items():
            if find_peer(name, packages) is None:
                unavailable.append(f"{peer.title}: not found; it comes with {peer.get}")
            else:
                names.append(PACKAGE + name)
    if not names:
        raise ConfigError(
            "no tokenizer named and no peer found; name a directory with a tokenizer.json, or use --peers"
        )
    measured = [load_measured(name, packages) for name in names]
    folder = evaluation_folder()
    judges: dict[str, list[GoldSentence]] = {}
    texts = _texts(text or [HELD_OUT + name for name in ("ko", "en", "code")])
    if folder is None:
        unavailable.append(f"text of other kinds and treebanks: not found; name their folder in {VARIABLE}")
    else:
        texts += [] if text else out_of_domain_texts(folder)
        judges |= treebanks(folder)
    analyser = independent_analyser()
    if analyser is None:
        unavailable.append("an analyser that no tokenizer learnt from (python-mecab-ko): not installed")
    elif judges:
        judges[analyser.name] = analysed(analyser, [s.text for found in list(judges.values()) for s in found])
    result = TokenizerReport(
        tokenizer_report(measured, texts),
        boundary_report(measured, judges),
        unavailable,
        {entry.name: entry.source for entry in measured},
    )
    if out is not None:
        page = write_tokenizer_report(result, out)
    if as_json:
        print_json(result.to_json())
        return
    _print(result)
    if out is not None:
        echo(f"page: {page}")


def _print(report: TokenizerReport) -> None:
    texts = list(dict.fromkeys(row.text for row in report.compression))
    head = ["tokenizer", "ids", *texts]
    sizes = {row.tokenizer: row.vocab_size for row in report.compression}
    measures: list[tuple[str, Callable[[ReportRow], float | None]]] = [
        ("bytes per token (higher is more compact)", lambda row: row.bytes_per_token),
        ("tokens per Hangul syllable (lower is more compact)", lambda row: row.tokens_per_syllable),
    ]
    for title, measure in measures:
        cells = {(row.tokenizer, row.text): _number(measure(row)) for row in report.compression}
        table(title, head, [(name, size, *(cells[name, text] for text in texts)) for name, size in sizes.items()])
    if report.boundaries:
        table(
            "boundaries of Korean morphemes",
            ["tokenizer", "judge", "F1", "precision", "recall"],
            [
                (row.tokenizer, row.judge, _number(row.f1), _number(row.precision), _number(row.recall))
                for row in report.boundaries
            ],
        )
    for name in sorted({row.tokenizer for row in report.compression if not row.lossless}):
        echo(f"not lossless: {name}")
    for line in report.unavailable:
        echo(f"unavailable: {line}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _texts(names: list[str]) -> list[Text]:
    from hcx.errors import DataError
    from hcx.tokenizer.report import Text

    contents = []
    held_out: dict[str, str] = {}
    for name in names:
        if name.startswith(HELD_OUT):
            held_out = held_out or _held_out()
            language = name.removeprefix(HELD_OUT)
            if language not in held_out:
                raise DataError(f"--text {name}: valid: {', '.join(HELD_OUT + known for known in held_out)}")
            contents.append(Text(name, held_out[language], "in"))
            continue
        try:
            contents.append(Text(name, Path(name).read_bytes().decode("utf-8")))
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
