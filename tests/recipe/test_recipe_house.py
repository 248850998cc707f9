"""The house model: made once, found again by its recipes, refused where they differ, and equal when made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hcx.config import load_config
from hcx.data import DataRecipe
from hcx.data.fim import infill_prompt
from hcx.errors import CheckpointError, DataError
from hcx.generate import Generator, SamplingParams
from hcx.model.load import load_model
from hcx.recipe import infill
from hcx.recipe.house import House, Reproduction, Variant
from hcx.recipe.infill import Blank, Way, blanks, measure_infilling
from hcx.recipe.quality import Estimate
from hcx.recipe.train import TrainRecipe, load_train_recipe
from hcx.report.house_card import HouseFigures, card_text, is_current, measure_house, stated_reproduction, write_card
from hcx.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class TinyHouse(House):
    """The same course with a model of seconds."""

    steps: int = 4

    def data_recipe(self, variant: Variant) -> DataRecipe:
        return load_config(DataRecipe, ROOT / "launch/data/tiny.yaml", [])

    def train_recipe(self, variant: Variant, overrides: Sequence[str] = ()) -> TrainRecipe:
        small = [
            f"out={self.run(variant)}",
            f"data.shards={self.shards(variant)}",
            "model.vocab_size=1024",
            "model.hidden_size=32",
            "model.intermediate_size=64",
            "model.num_layers=2",
            "model.num_heads=2",
            "model.num_kv_heads=1",
            f"train.steps={self.steps}",
            "train.global_batch=2",
            "train.micro_batch=2",
            "train.validate_every=4",
            "train.checkpoint_every=2",
            "optim.schedule.warmup_steps=1",
            "validation.max_documents=2",
            "engine.precision=fp32",
        ]
        return load_train_recipe(ROOT / "launch/train/house.yaml", [*small, *overrides])


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> TinyHouse:
    folder = tmp_path_factory.mktemp("house")
    text = folder / "text"
    text.mkdir()
    (text / "manifest.json").write_text("{}")
    made = TinyHouse(folder / "house", text)
    assert made.make()
    return made


def test_what_was_made_from_the_same_recipes_is_kept(house: TinyHouse) -> None:
    before = (house.model("house") / "manifest.json").stat().st_mtime_ns
    assert house.make()
    assert (house.model("house") / "manifest.json").stat().st_mtime_ns == before
    assert house.finished("house")
    assert not house.finished("plain")


def test_a_model_of_another_recipe_is_refused_with_what_differs(house: TinyHouse) -> None:
    with pytest.raises(CheckpointError, match=r"made from another recipe \(train.steps: [0-9]+ there, 6 now"):
        TinyHouse(house.out, house.text, steps=6).make()


def test_text_that_was_not_fetched_is_left_alone(house: TinyHouse, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="is not the fetched text"):
        TinyHouse(tmp_path / "house", tmp_path / "mine").make()


def test_the_beginning_trained_again_is_equal_bit_for_bit_and_a_changed_record_is_not(house: TinyHouse) -> None:
    repeated = house.reproduce()
    assert repeated.equal
    assert repeated.steps == 2
    other = Reproduction(repeated.steps, repeated.recorded, "000001-000002-ffffffffffff.jsonl")
    assert not other.equal


def test_without_a_run_there_is_nothing_to_reproduce(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run hcx house-model first"):
        House(tmp_path / "none", tmp_path / "text").reproduce()


def test_the_card_states_the_digests_and_goes_stale_with_the_model(house: TinyHouse) -> None:
    figures = measure_house(house, ("house",), None)
    assert not is_current(house, ("house",))
    text = write_card(figures, house.out).read_text(encoding="utf-8")
    assert is_current(house, ("house",))
    assert not is_current(house, ("house", "no-fim"))
    digest = next(iter(figures.facts["weights"].values()))
    assert digest in text
    assert "was not trained again" in text


def test_a_card_written_again_keeps_what_was_reproduced_of_this_model_alone(house: TinyHouse) -> None:
    again = Reproduction(2, "a", "a")
    figures = measure_house(house, ("house",), again)
    write_card(figures, house.out)
    assert stated_reproduction(house) == again
    facts = figures.facts | {"measured": {"house": "sha256:another"}}
    write_card(replace(figures, facts=facts), house.out)
    assert stated_reproduction(house) is None
    (house.out / "card.json").write_text("{")
    assert stated_reproduction(house) is None


def _estimates(**values: float) -> dict[str, Estimate]:
    return {name: Estimate(value, value - 0.01, value + 0.01) for name, value in values.items()}


def test_the_card_says_where_the_house_model_is_not_better() -> None:
    bits = {"house": _estimates(ko=1.0, en=1.5), "plain": _estimates(ko=1.1, en=1.4)}
    facts = dict.fromkeys(("parameters", "trained_tokens", "seed", "threads"), 1)
    facts |= dict.fromkeys(("infilling", "shards", "tokenizer", "created", "torch", "processor"), "x")
    facts |= {"weights": {}, "producer": {"version": "0", "commit": "c"}}
    text = card_text(HouseFigures(bits, {}, {}, [], facts, Reproduction(2, "a", "b")))
    assert "Korean -9.1%, English +7.1% bits per byte: not better in English" in text
    assert "were NOT the same" in text


def test_blanks_are_whole_words_of_the_text_and_do_not_depend_on_their_neighbours() -> None:
    texts = [f"첫째 줄에는 이런 글이 있고 {word} 뒤에도 여러 낱말이 이어집니다.\n" * 4 for word in ("사과가", "배가")]
    cut = blanks(texts, words=2, count=5, seed=3)
    assert len(cut) == 2
    for blank, text in zip(cut, texts, strict=True):
        assert blank.prefix + blank.middle + blank.suffix in text
        assert len(blank.middle.split()) == 2
        assert "\n" not in blank.middle
    assert blanks(texts[1:], 2, 5, 3) == cut[1:]


def test_a_middle_is_exact_if_it_is_what_greedy_decoding_writes(
    house: TinyHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's own greedy continuation, written by the generator, in place of the middle; then one token altered."""
    model = load_model(house.model("house"))
    generator = Generator(model)
    changed_by, changed_end = [0], [0]

    def own_continuation(tokenizer: Tokenizer, blank: Blank, way: Way, limit: int) -> tuple[list[int], list[int]]:
        prompt = infill_prompt(tokenizer, blank.prefix[-60:], blank.suffix[:40])
        written = list(generator.generate([prompt], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids)
        # The last token stands where end-of-text would; left to right has none, so there all four are the middle.
        place = -2 if way != "left_to_right" else -1
        written[place] = (written[place] + changed_by[0]) % 1024
        written[-1] = (written[-1] + changed_end[0]) % 1024
        return prompt, written

    monkeypatch.setattr(infill, "_tokens", own_continuation)
    asked = [("tiny", house.model("house"))]
    for altered, end, exact, ended in ((0, 0, 1.0, 1.0), (1, 0, 0.0, 0.0), (0, 1, 1.0, 0.0)):
        changed_by[0], changed_end[0] = altered, end
        for figure in measure_infilling(asked, house.shards("house"), words=(1,), count=3):
            if figure.way != "left_to_right":
                assert (figure.exact[0], figure.ended) == (exact, ended)
            elif not end:
                assert (figure.exact[0], figure.ended) == (exact, 0.0)
