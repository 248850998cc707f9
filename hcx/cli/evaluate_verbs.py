"""What `hcx eval` does besides evaluating a model: data, tables, contamination, red-team logs, a toxicity scorer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hcx.cli.output import echo, print_json
from hcx.errors import EvalError


@dataclass(frozen=True)
class Request:
    """The command line of one of these verbs.

    Attributes:
        words: what follows the verb.
        out: `--out`.
        source: `--from`.
        data: `--data`.
        language: `--language`.
        against: `--against`.
        as_json: `--json`.
        tasks: `--tasks`.
        limit: `--limit`.
        suite: `--suite`.
        poll_s: `--poll`.
    """

    words: tuple[str, ...]
    out: Path | None
    source: Path | None
    data: Path | None
    language: str
    against: Path | None
    as_json: bool
    tasks: list[str] | None
    limit: int | None
    suite: str | None
    poll_s: float | None

    def some(self, what: str) -> tuple[str, ...]:
        """The words.

        Raises:
            EvalError: there are none.
        """
        if not self.words:
            raise EvalError(f"give {what}")
        return self.words

    def output(self) -> Path:
        """Where to write.

        Raises:
            EvalError: no `--out`.
        """
        if self.out is None:
            raise EvalError("--out: say where to write")
        return self.out


def _fetch(request: Request) -> None:
    from hcx.evals.fetch import fetch

    found = fetch(request.some("one or more suites or tasks"), request.output(), request.source)
    if request.as_json:
        print_json(found)
        return
    for row in found["datasets"]:
        counts = ", ".join(f"{split} {count}" for split, count in row["rows"].items())
        part = f"  ({row['part']})" if row["part"] else ""
        echo(f"{row['path']}{'' if row['name'] is None else ' ' + row['name']}: {counts}{part}")
    echo(f"tasks that run from it: {', '.join(found['tasks']) or '(none)'}")
    for name, why in found["failed"].items():
        echo(f"not there: {name}: {why}")


def _table(request: Request) -> None:
    from hcx.evals.tables import comparison

    text = comparison([Path(word) for word in request.some("one or more result directories")], request.language)
    if request.out is not None:
        request.out.write_text(text, encoding="utf-8")
    else:
        echo(text.rstrip("\n"))


def _contamination(request: Request) -> None:
    from hcx.evals.contamination import contamination
    from hcx.evals.fetch import cards_named

    if request.against is None:
        raise EvalError("--against: name the training text (JSON lines with `text`; .gz and .xz are unpacked)")
    rows = contamination(cards_named(request.some("suites or tasks")), request.data, request.against)
    if request.as_json:
        print_json(rows)
        return
    for name, row in rows.items():
        echo(f"{name}: {row['items_found']} of {row['items']} items in {row['documents']} documents")


def _redteam(request: Request) -> None:
    from hcx.evals.redteam import demonstrations, preference_pairs, read_log, verdicts

    (log,) = request.some("one log")[:1]
    turns = read_log(log)
    out = request.output()
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("preferences.jsonl", preference_pairs(turns)), ("demonstrations.jsonl", demonstrations(turns))):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / name).write_text(text, encoding="utf-8")
        echo(f"{out / name}: {len(rows)}")
    for model, found in verdicts(turns).items():
        rate = found["attack_success_rate"]
        asr = "no verdicts" if rate is None else f"attack success {rate:.2%} of {found['dialogues']} dialogues"
        over = "" if found["over_refusal"] is None else f", over-refusal {found['over_refusal']:.2%}"
        echo(f"{model}: {asr}{over}, harmless {found['harmless']:.2f}, overall {found['overall']:.2f} of 7")


def _fit_toxicity(request: Request) -> None:
    from hcx.evals.toxicity import fit

    rows = [row for word in request.some("labelled files (JSON lines: text, toxic)") for row in _labelled(word)]
    scorer = fit((str(row["text"]) for row in rows), (bool(row["toxic"]) for row in rows), request.output())
    echo(f"{request.output()}: {scorer.identity}, fitted on {len(rows)} texts")


def _labelled(word: str) -> list[dict[str, object]]:
    from hcx.evals.sources import read_jsonl

    return read_jsonl(Path(word), ("text", "toxic"))


def _watch(request: Request) -> None:
    import tempfile

    import torch

    from hcx.evals import evaluate
    from hcx.evals.run import choose
    from hcx.evals.watch import evaluate_new, watch
    from hcx.recipe.convert import convert_model

    run, out = Path(request.some("the run's folder")[0]), request.output()
    choose(request.tasks, request.suite, request.limit, request.data)

    def one(checkpoint: Path, result: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="hcx-eval-") as folder:
            model = Path(folder) / "model"
            convert_model(checkpoint, model, torch.float32)
            evaluate(
                model, tasks=request.tasks, suite=request.suite, out=result, limit=request.limit, data=request.data
            )
        echo(f"{checkpoint.name}: {result}")

    if request.poll_s is None:
        evaluate_new(run, out, one)
    else:
        watch(run, out, one, request.poll_s)


OTHER_VERBS: dict[str, Callable[[Request], None]] = {
    "fetch": _fetch,
    "table": _table,
    "contamination": _contamination,
    "redteam": _redteam,
    "fit-toxicity": _fit_toxicity,
    "watch": _watch,
}
"""First word after `hcx eval` -> what it does. A folder of that name is a model all the same."""
