"""The items of hcx's tasks, as lm-eval asks for them (`custom_dataset` in the task files).

lm-eval calls each function with the task's metadata and the model arguments as keywords; what is not needed is ignored.
The functions work under every lm-eval model: `hcx`, `hf`, `local-completions`.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from hcx.artifacts import find_resource
from hcx.errors import DataError
from hcx.evals.letters import shuffled
from hcx.evals.sources import embedded_documents, embedded_pairs, kmmlu_items, mmlu_items, own_file, read_jsonl
from hcx.obs import get_logger

ASSISTANT = "\n\nAssistant:"
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


def _parallel(language: str, dataset: str, config: str | None = None) -> dict[str, Any]:
    """`source, reference, prompt` of a set whose `test` split has the columns `ko` and `en`."""
    import datasets

    source, reference = language.split("-")
    pairs = datasets.load_dataset(dataset, config, split="test")
    return _dataset(
        [
            {
                "source": pair[source],
                "reference": pair[reference],
                "prompt": translation_prompt(pair[source], language),
            }
            for pair in pairs
        ]
    )


def ntrex(language: str, **_: Any) -> dict[str, Any]:
    """NTREX-128's English and Korean sentences with the exemplars of `translation`."""
    return _parallel(language, "MicrosoftTranslator/NTREX", "en-ko")


def pud(language: str, **_: Any) -> dict[str, Any]:
    """The sentences of the Korean Parallel Universal Dependencies with the exemplars of `translation`."""
    return _parallel(language, "UniversalDependencies/UD_Korean-PUD")


def korean_parallel(language: str, config: str, **_: Any) -> dict[str, Any]:
    """A test file of korean-parallel-corpora (Park, Hong and Cha 2016), `news` or `jhe`, with those exemplars."""
    return _parallel(language, "jungyeul/korean-parallel-corpora", config)


def stylekqc(language: str, **_: Any) -> dict[str, Any]:
    """Spoken requests of StyleKQC with those exemplars."""
    return _parallel(language, "cynthia/stylekqc")


def harmless_preferences(**_: Any) -> dict[str, Any]:
    """Anthropic/hh-rlhf, harmless-base, test: `prompt, choices, gold`.

    The two replies stand in an order drawn from the prompt: a tie goes to the first, which must not mean the right one.
    `chosen` and `rejected` are whole dialogues. What both share up to a turn of the assistant's is the prompt, what
    differs is to be compared. Pairs that are one and the same text are dropped: nothing can be preferred there.
    """
    import datasets

    rows = []
    for row in datasets.load_dataset("Anthropic/hh-rlhf", data_dir="harmless-base", split="test"):
        chosen, rejected = row["chosen"], row["rejected"]
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        start = chosen.rfind(ASSISTANT, 0, same) + len(ASSISTANT)
        if start < len(ASSISTANT):
            raise DataError(f"hh-rlhf: a pair without a common turn of the assistant's: {chosen[:60]!r}")
        replies = [dialogue[start:].strip() for dialogue in (chosen, rejected)]
        if replies[0] != replies[1]:
            item = {"question": chosen[:start].strip(), "choices": replies, "gold": 0}
            rows.append({**shuffled(item), "prompt": item["question"]})
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
