"""Where evaluation items come from: text that hcx ships, item files inside the lm-eval package, or a folder of yours.

KMMLU is CC-BY-ND, so its items are read from the installed lm-eval package at run time and never copied. What is there
is the pool of few-shot exemplars of both benchmarks, not their test sets: scores are called `dev225` and `dev282`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import hcx
from hcx.artifacts import find_resource
from hcx.errors import DataError

Source = Literal["embedded-text", "embedded-pairs", "kmmlu-dev225", "mmlu-dev282", "hub", "files"]

DATA_SETS: tuple[Source, ...] = ("hub", "files")
"""Sources that a bundle holds: data sets of the hub, and those that only their authors' repositories publish."""

DATA_VARIABLE = "HCX_EVAL_DATA"
"""Environment variable that names the folder of item files when `--data` does not."""

RECIPE = "launch/data/demo.yaml"
"""The data recipe whose held-out documents are scored."""

KMMLU_ITEMS = 225
MMLU_ITEMS = 282


def data_directory(data: str | Path | None) -> Path | None:
    """The folder of a user's item files, if one is named."""
    chosen = data or os.environ.get(DATA_VARIABLE)
    return Path(chosen) if chosen else None


def lm_eval_tasks() -> Path | None:
    """The `tasks` folder of the installed lm-eval, found without importing it."""
    try:
        spec = importlib.util.find_spec("lm_eval")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "tasks"


def missing_data(source: Source, language: str, data: str | Path | None = None) -> str | None:
    """Why a source has no items here, or None if it has."""
    folder = data_directory(data)
    if folder is not None and not folder.is_dir():
        return f"{folder}: no such folder (given by --data or {DATA_VARIABLE})"
    if own_file(source, language, data) is not None:
        return None
    if source == "kmmlu-dev225" and not _kmmlu_files():
        return (
            f"the installed lm-eval lacks tasks/kmmlu/cot_hard; install lm-eval==0.4.13, or {_advice(source, language)}"
        )
    if source == "mmlu-dev282" and not _mmlu_file():
        return (
            f"the installed lm-eval lacks tasks/mmlu/flan_cot_fewshot; install lm-eval==0.4.13, "
            f"or {_advice(source, language)}"
        )
    if source in ("embedded-text", "embedded-pairs"):
        # Looked for, not opened: reading it would make `hcx eval --list` wait for torch.
        path = _shipped_file(source, language)
        if not path.exists():
            return f"{path}: missing; install hcx again, or {_advice(source, language)}"
    return None


def _shipped_file(source: Source, language: str) -> Path:
    if language == "code":
        return Path(sysconfig.get_paths()["stdlib"])
    folder = Path(hcx.__file__).parent / "data" / "embedded"
    return folder / ("pairs.jsonl.xz" if source == "embedded-pairs" else f"{language}.jsonl.xz")


def file_name(source: Source, language: str) -> str:
    """Name of the user's item file that replaces a source."""
    if source == "embedded-text":
        return f"held_out_{language}.jsonl"
    return {"embedded-pairs": "translation_pairs.jsonl"}.get(source, f"{source}.jsonl")


def own_file(source: Source, language: str, data: str | Path | None = None) -> Path | None:
    """The user's item file for a source, if there is one."""
    folder = data_directory(data)
    path = folder / file_name(source, language) if folder is not None else None
    return path if path is not None and path.is_file() else None


def _advice(source: Source, language: str) -> str:
    return f"put {file_name(source, language)} into a folder and name it with --data or {DATA_VARIABLE}"


def read_jsonl(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of a user's item file.

    Raises:
        DataError: a line is not a JSON object or lacks a key.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error})") from None
            absent = [key for key in keys if not isinstance(row, dict) or key not in row]
            if absent:
                raise DataError(f"{path}:{number}: lacks {', '.join(absent)}; needed: {', '.join(keys)}")
            rows.append(row)
    if not rows:
        raise DataError(f"{path}: empty; one JSON object per line is expected")
    return rows


@cache
def embedded_documents(language: str) -> tuple[str, ...]:
    """Held-out documents of the shipped data recipe, in its mixed order: those that its shards hold out too.

    Korean and English text ships with hcx; code is the standard library of the Python that runs, so its files differ
    between Python versions.
    """
    from hcx.config import load_config
    from hcx.data import DataRecipe
    from hcx.data.build import read_texts

    path = find_resource(RECIPE)
    recipe = load_config(DataRecipe, path)
    return tuple(document.text for document in read_texts(recipe, path.parent)[language].documents["validation"])


def embedded_pairs() -> Iterator[tuple[str, str]]:
    """Held-out (Korean, English) pairs of software documentation that hcx ships."""
    from hcx.data import shipped

    yield from ((pair["ko"], pair["en"]) for pair in shipped.translation_pairs())


def _kmmlu_files() -> list[Path]:
    tasks = lm_eval_tasks()
    return sorted(tasks.glob("kmmlu/cot_hard/kmmlu_cot_hard_*.yaml")) if tasks is not None else []


def _mmlu_file() -> Path | None:
    tasks = lm_eval_tasks()
    path = tasks / "mmlu" / "flan_cot_fewshot" / "_cot_prompts.json" if tasks is not None else None
    return path if path is not None and path.is_file() else None


def kmmlu_items() -> list[dict[str, Any]]:
    """The 225 exemplars of KMMLU (45 subjects, 5 each): `subject, question, choices, gold`.

    Ordered by number within the subject, so that the first items of a limited run spread over the subjects.
    """
    from ruamel.yaml import YAML

    items = []
    for path in _kmmlu_files():
        values = YAML(typ="safe", pure=False).load(path.read_text(encoding="utf-8"))
        for number, sample in enumerate((values.get("fewshot_config") or {}).get("samples") or ()):
            # The reasoning may name several options; the last "정답 ... (X)" is its conclusion.
            found = re.findall(r"정답\D{0,12}?\(?([A-D])\)?", sample["target"])
            if not found:
                raise DataError(f"{path}: item {number} states no answer; a lm-eval of another version?")
            items.append(
                {
                    "subject": values["dataset_name"],
                    "number": number,
                    "question": re.sub(r"^질문\s*:\s*", "", sample["question"]).strip(),
                    "choices": [str(sample[letter]).strip() for letter in "ABCD"],
                    "gold": "ABCD".index(found[-1]),
                }
            )
    return _spread(items, KMMLU_ITEMS, "KMMLU")


def mmlu_items() -> list[dict[str, Any]]:
    """The 282 development items of MMLU in the chain-of-thought prompts: `subject, question, choices, gold`."""
    path = _mmlu_file()
    prompts = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
    items = []
    for subject, prompt in sorted(prompts.items()):
        for number, block in enumerate(re.split(r"(?:^|\n\n)Q: ", prompt)[1:]):
            gold = re.search(r"[Tt]he answer is \(?([A-E])\)?", block)
            # Options follow the question on one line; a few items have a fifth.
            parts = re.split(r"\s*\(([A-E])\) ?", block.split("\nA: ")[0])
            letters = "".join(parts[1::2])
            question, options = parts[0], parts[2::2]
            if gold is None or letters not in ("ABCD", "ABCDE"):
                question, options = _careful_split(block)
            if gold is None or len(options) not in (4, 5):
                raise DataError(f"{path}: {subject} item {number} cannot be read; a lm-eval of another version?")
            items.append(
                {
                    "subject": subject.replace("_", " "),
                    "number": number,
                    "question": _mend_tex(question),
                    "choices": [_mend_tex(option) for option in options],
                    "gold": "ABCDE".index(gold.group(1)),
                }
            )
    return _spread(items, MMLU_ITEMS, "MMLU")


def _careful_split(block: str) -> tuple[str, list[str]]:
    """Question and options where the question itself contains a letter in brackets."""
    head = block.split("\nA: ")[0]
    found = re.search(r"^(.*?)\n?\(A\)(.*?)\(B\)(.*?)\(C\)(.*?)\(D\)(.*)$", head, re.DOTALL)
    return (found.group(1), list(found.groups()[1:])) if found else (head, [])


def _mend_tex(text: str) -> str:
    # The file holds `\f` and `\r` of `\frac` and `\right` as control characters.
    text = text.replace("\x0c", "\\f")
    return re.sub(r"\r(?=[a-z])", r"\\r", text).strip()


def _spread(items: list[dict[str, Any]], expected: int, name: str) -> list[dict[str, Any]]:
    if len(items) != expected:
        raise DataError(
            f"{name}: found {len(items)} items inside lm-eval, expected {expected}; install lm-eval==0.4.13"
        )
    return sorted(items, key=lambda item: (item["number"], item["subject"]))
