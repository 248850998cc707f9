"""The items of hcx's tasks, as lm-eval asks for them (`custom_dataset` in the task files).

lm-eval calls each function with the task's metadata and the model arguments as keywords; what is not needed is ignored.
The functions work under every lm-eval model: `hcx`, `hf`, `local-completions`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from hcx.artifacts import find_resource
from hcx.errors import DataError
from hcx.evals.sources import embedded_documents, embedded_pairs, kmmlu_items, mmlu_items, own_file, read_jsonl
from hcx.obs import get_logger

EXEMPLARS = "evals/tasks/translation/exemplars.jsonl"

log = get_logger(__name__)


def _dataset(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}


def documents(
    language: str, pretrained: Any = None, tokenizer: Any = None, data: str | None = None, **_: Any
) -> dict[str, Any]:
    """Held-out documents, each followed by the tokenizer's end of text, because the model must predict that too.

    Args:
        language: `ko`, `en` or `code`.
        pretrained: the model directory, which holds the tokenizer.
        tokenizer: directory of the tokenizer, where the model is elsewhere (`local-completions`).
        data: folder of a user's item files.
    """
    path = own_file("embedded-text", language, data)
    if path is not None:
        texts = [str(row["text"]) for row in read_jsonl(path, ("text",))]
    else:
        texts = list(embedded_documents(language))
    end = end_of_text(tokenizer or pretrained)
    return _dataset([{"text": text + end, "bytes": len(text.encode())} for text in texts if text])


def end_of_text(directory: Any) -> str:
    """The end-of-text token of a directory's tokenizer, as text; empty, with a warning, if there is none to find."""
    folder = Path(directory) if isinstance(directory, (str, Path)) else None
    config = folder / "tokenizer_config.json" if folder is not None else None
    if config is not None and config.is_file():
        token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token:
            return str(token)
    log.warning(
        "no eos_token known (%s): bits per byte leave the end of each document out, and are not comparable "
        "with those that count it; name the tokenizer's directory",
        directory,
    )
    return ""


def kmmlu_dev225(data: str | None = None, **_: Any) -> dict[str, Any]:
    """The 225 few-shot exemplars of KMMLU as questions."""
    return _multiple_choice("kmmlu-dev225", "ko", data)


def mmlu_dev282(data: str | None = None, **_: Any) -> dict[str, Any]:
    """The 282 development items of MMLU as questions."""
    return _multiple_choice("mmlu-dev282", "en", data)


def _multiple_choice(source: Any, language: str, data: str | None) -> dict[str, Any]:
    path = own_file(source, language, data)
    if path is None:
        return _dataset(kmmlu_items() if source == "kmmlu-dev225" else mmlu_items())
    rows = read_jsonl(path, ("subject", "question", "choices", "gold"))
    for number, row in enumerate(rows, 1):
        if not isinstance(row["choices"], list) or row["gold"] not in range(len(row["choices"])):
            raise DataError(f"{path}:{number}: choices is a list of texts, gold the index of the right one")
    return _dataset(rows)


@cache
def exemplars() -> tuple[tuple[str, str], ...]:
    """The fixed (Korean, English) pairs that show a base model what to do."""
    rows = read_jsonl(find_resource(EXEMPLARS), ("ko", "en"))
    return tuple((str(row["ko"]), str(row["en"])) for row in rows)


def translation(language: str, data: str | None = None, **_: Any) -> dict[str, Any]:
    """Held-out pairs as `source, reference, prompt`; pairs that an exemplar repeats are left out.

    Args:
        language: `ko-en` (from Korean) or `en-ko` (from English).
        data: folder of a user's item files.
    """
    path = own_file("embedded-pairs", language, data)
    if path is not None:
        pairs = [(str(row["ko"]), str(row["en"])) for row in read_jsonl(path, ("ko", "en"))]
    else:
        pairs = list(embedded_pairs())
    shown = {side for pair in exemplars() for side in pair}
    rows = []
    for ko, en in pairs:
        ko, en = " ".join(ko.split()), " ".join(en.split())
        if ko and en and ko not in shown and en not in shown:
            source, reference = (ko, en) if language == "ko-en" else (en, ko)
            rows.append({"source": source, "reference": reference, "prompt": translation_prompt(source, language)})
    if not rows:
        raise DataError("translation: no held-out pairs")
    return _dataset(rows)


def translation_prompt(source: str, language: str) -> str:
    """A prompt that a base model can follow: the exemplars, then the source line and the target's name."""
    first, second = ("Korean", "English") if language == "ko-en" else ("English", "Korean")
    lines = []
    for ko, en in exemplars():
        left, right = (ko, en) if language == "ko-en" else (en, ko)
        lines.append(f"{first}: {left}\n{second}: {right}\n")
    return "\n".join([*lines, f"{first}: {source}\n{second}:"])


LANGUAGE_NAMES = {"ko": "Korean", "en": "English", "ja": "Japanese", "zh": "Chinese"}
FLORES = {"ko": "kor_Hang", "en": "eng_Latn", "ja": "jpn_Jpan", "zh": "cmn_Hans"}
"""FLORES+'s configurations."""


def flores(language: str, **_: Any) -> dict[str, Any]:
    """Sentences of FLORES+ in two languages, joined by their number: `source, reference, prompt` in dev and devtest.

    Args:
        language: source and target, such as `ja-ko`.
    """
    import datasets

    left, right = language.split("-")
    sides = [datasets.load_dataset("openlanguagedata/flores_plus", FLORES[code]) for code in (left, right)]
    found = {}
    for split in ("dev", "devtest"):
        source, target = ({row["id"]: row["text"] for row in side[split]} for side in sides)
        if set(source) != set(target):
            raise DataError(f"FLORES+ {split}: {left} and {right} do not hold the same sentences")
        found[split] = datasets.Dataset.from_list(
            [
                {
                    "source": source[number],
                    "reference": target[number],
                    "prompt": f"{LANGUAGE_NAMES[left]}: {source[number]}\n{LANGUAGE_NAMES[right]}:",
                }
                for number in sorted(source, key=int)
            ]
        )
    return found


def ntrex(language: str, **_: Any) -> dict[str, Any]:
    """NTREX-128's English and Korean sentences with the exemplars of `translation`."""
    import datasets

    pairs = datasets.load_dataset("MicrosoftTranslator/NTREX", "en-ko", split="test")
    rows = []
    for pair in pairs:
        source, reference = (pair["ko"], pair["en"]) if language == "ko-en" else (pair["en"], pair["ko"])
        rows.append({"source": source, "reference": reference, "prompt": translation_prompt(source, language)})
    return _dataset(rows)


MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def hendrycks_math(**_: Any) -> dict[str, Any]:
    """MATH, its seven subjects one after the other: `problem, solution, level, type`."""
    import datasets

    parts = [datasets.load_dataset("EleutherAI/hendrycks_math", subject) for subject in MATH_SUBJECTS]
    return {split: datasets.concatenate_datasets([part[split] for part in parts]) for split in ("train", "test")}


def infilling(config: str, layout: str, pretrained: Any = None, tokenizer: Any = None, **_: Any) -> dict[str, Any]:
    """Rows of human-eval-infilling, the prompt in one order, with the sentinels of the model's tokenizer.

    Args:
        config: one of the four configurations.
        layout: `psm` or `spm`.
        pretrained: the model directory, which holds the tokenizer; without it the prompt shows stand-ins.
        tokenizer: directory of the tokenizer, where the model is elsewhere.
    """
    import datasets

    from hcx.evals.programs import Sentinels, psm, spm

    directory = tokenizer or pretrained
    sentinels = Sentinels.NAMES[0] if directory is None else Sentinels.of(directory)
    make = psm if layout == "psm" else spm
    rows = datasets.load_dataset("loubnabnl/humaneval_infilling", config, split="test")
    return _dataset([{**row, "infill": make(row["prompt"], row["suffix"], sentinels)} for row in rows])
