"""Items: read from the installed lm-eval, complete, with the right answers, and never shared with the exemplars."""

import json

import datasets
import pytest

pytest.importorskip("lm_eval")

from hcx.errors import DataError
from hcx.evals.items import (
    documents,
    exemplars,
    harmless_preferences,
    kmmlu_dev225,
    translation,
    translation_prompt,
)
from hcx.evals.scoring import bits_per_byte, document_bits, english_question, korean_question, letters
from hcx.evals.sources import kmmlu_items, mmlu_items


def test_kmmlu_has_its_225_exemplars_of_45_subjects_with_answers_among_the_options():
    items = kmmlu_items()
    assert len(items) == 225
    assert len({item["subject"] for item in items}) == 45
    assert len({item["subject"] for item in items[:45]}) == 45
    assert all(len(item["choices"]) == 4 and 0 <= item["gold"] < 4 for item in items)
    # The answer stated last in the exemplar's reasoning; read by eye.
    accounting = items[0]
    assert accounting["subject"] == "accounting"
    assert accounting["choices"][accounting["gold"]] == "￦1,020,000"
    assert not accounting["question"].startswith("질문")


def test_mmlu_has_its_282_development_items_of_57_subjects():
    items = mmlu_items()
    assert len(items) == 282
    assert len({item["subject"] for item in items}) == 57
    assert [len(item["choices"]) for item in items].count(5) == 1
    assert all(0 <= item["gold"] < len(item["choices"]) for item in items)
    assert not any("(A)" in part for item in items for part in [item["question"], *item["choices"]])
    assert any("\\frac{" in item["question"] for item in items)


def test_prompts_are_those_of_the_benchmarks():
    doc = {"subject": "astronomy", "question": "Which? ", "choices": ["a", "b", "c", "d"], "gold": 1}
    assert korean_question(doc) == "Which?\nA. a\nB. b\nC. c\nD. d\n정답："
    assert english_question(doc).startswith(
        "The following are multiple choice questions (with answers) about astronomy."
    )
    assert english_question(doc).endswith("D. d\nAnswer:")
    assert letters({"choices": list("vwxyz")}) == ["A", "B", "C", "D", "E"]


def test_documents_end_with_the_tokenizers_end_of_text_and_count_their_own_bytes(item_files, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|eos|>"}}))
    rows = documents("ko", pretrained=str(tmp_path), data=str(item_files), version=1.0)["test"]
    assert rows[0]["text"].endswith("누르십시오.<|eos|>")
    assert rows[0]["bytes"] == len(rows[0]["text"].removesuffix("<|eos|>").encode())


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight():
    import math

    doc = {"text": "가나", "bytes": 6}
    score = document_bits(doc, [-6 * math.log(256)])["bits_per_byte"]
    assert bits_per_byte([score, score]) == pytest.approx(8.0)


def test_translation_items_never_repeat_an_exemplar(tmp_path):
    ko, en = exemplars()[0]
    rows = [{"ko": ko, "en": en}, {"ko": "파일을 엽니다.", "en": "Opens the file."}]
    (tmp_path / "translation_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = translation("en-ko", data=str(tmp_path))["test"]
    assert [row["source"] for row in found] == ["Opens the file."]
    assert found[0]["reference"] == "파일을 엽니다."


def test_a_translation_prompt_ends_where_the_model_must_continue():
    prompt = translation_prompt("파일을 엽니다.", "ko-en")
    assert prompt.endswith("Korean: 파일을 엽니다.\nEnglish:")
    assert prompt.count("Korean:") == 1 + len(exemplars())


def test_a_damaged_item_file_is_named_with_its_line(tmp_path):
    (tmp_path / "kmmlu-dev225.jsonl").write_text('{"subject": "x", "question": "?", "choices": ["a"], "gold": 3}\n')
    with pytest.raises(DataError, match=r"kmmlu-dev225\.jsonl:1"):
        kmmlu_dev225(data=str(tmp_path))
    (tmp_path / "kmmlu-dev225.jsonl").write_text('{"subject": "x"}\n')
    with pytest.raises(DataError, match="lacks question"):
        kmmlu_dev225(data=str(tmp_path))


def test_preferred_replies_are_compared_after_what_both_dialogues_share(monkeypatch):
    first, second = "\n\nHuman: a\n\nAssistant:", "\n\nHuman: c\n\nAssistant:"
    pairs = [
        {"chosen": f"{first} b{second} d1", "rejected": f"{first} b{second} d2"},
        {"chosen": f"{first} Yes.{second} d", "rejected": f"{first} No."},
        {"chosen": f"{first} b", "rejected": f"{first} b"},
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(pairs))
    rows = list(harmless_preferences()["test"])
    assert [row["prompt"] for row in rows] == [
        "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        "Human: a\n\nAssistant:",
    ]
    assert [row["choices"][row["gold"]] for row in rows] == ["d1", f"Yes.{second} d"]
    pairs[:] = [{"chosen": "no dialogue", "rejected": "at all"}]
    with pytest.raises(DataError, match="common turn"):
        harmless_preferences()
