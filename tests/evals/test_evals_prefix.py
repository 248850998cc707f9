"""Contexts computed once give the same answers; deterministic mode gives the same bits at any batch size."""

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from hcx.evals.lm import HcxLM
from hcx.evals.prefix import Family, PrefixScorer, batches, common_beginning, families, saved_share, shared
from hcx.model.load import load_model
from hcx.testing.evaluation import evaluable_directory

CLOSE = 1e-4
"""fp32: sums of another order."""

SHOTS = "".join(f"질문: {i}번 도시의 이름은 무엇인가?\n정답: 서울 {i}\n\n" for i in range(5))
QUESTIONS = [
    (f"{SHOTS}질문: {n}번 {'긴 ' * n}질문이다.\n정답:", f" {answer}")
    for n in range(5)
    for answer in ("서울이다", "부산이다. 바다가 있다", "To open a file", "서울이다. 한강")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(evaluable_directory(tmp_path_factory.mktemp("prefix") / "model", max_seq_len=512))


def score(model, **options):
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(QUESTIONS)]
    return HcxLM(model, **options).loglikelihood(requests)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_with_shared_contexts_equal_those_without(model, batch_size, monkeypatch):
    ran = []
    run = PrefixScorer.run
    monkeypatch.setattr(PrefixScorer, "run", lambda self, found: ran.append(len(found)) or run(self, found))
    plain = score(model, batch_size=4, prefix_reuse=False)
    assert not ran
    reused = score(model, batch_size=batch_size)
    assert ran == [5]
    for (left, left_greedy), (right, right_greedy) in zip(plain, reused, strict=True):
        assert left == pytest.approx(right, abs=CLOSE)
        assert left_greedy == right_greedy


def test_deterministic_mode_gives_the_same_bits_at_any_batch_size(model):
    first, *others = (score(model, batch_size=size, deterministic=True) for size in (1, 8, 64))
    assert all(other == first for other in others)


def test_generation_gives_the_same_text_at_any_batch_size_in_deterministic_mode(model):
    requests = [
        Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 8}), i)
        for i, text in enumerate(["서울", "To open a document, choose", "def add("])
    ]
    answers = [HcxLM(model, batch_size=size, deterministic=True).generate_until(requests) for size in (1, 8)]
    assert answers[0] == answers[1]


def test_rows_of_one_context_are_one_family():
    context = tuple(range(100))
    rows = {(*context, 7, 8): 99, (*context, 9): 99, (*context[:50], 3, 3): 50}
    found = families(rows)
    assert sorted(len(family.rows) for family in found) == [1, 2]
    pair = next(family for family in found if len(family.rows) == 2)
    assert pair.prefix == 99


def test_no_scored_place_is_inside_a_shared_prefix():
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for _ in range(200):
        length = int(torch.randint(1, 12, (1,), generator=generator))
        row = tuple(torch.randint(0, 2, (length,), generator=generator).tolist())
        rows[row] = min(rows.get(row, 99), int(torch.randint(0, length, (1,), generator=generator)))
    found = families(rows)
    assert sorted(row for family in found for row in family.rows) == sorted(rows)
    for family in found:
        for row in family.rows:
            assert family.prefix <= rows[row]
            assert row[: family.prefix] == family.rows[0][: family.prefix]
    grouped = [family for group in batches(found, 7) for family in group]
    assert sorted(grouped, key=lambda f: f.rows) == sorted(found, key=lambda f: f.rows)


def test_common_beginnings_are_found():
    assert shared((1, 2, 3), (1, 2, 4)) == 2
    assert shared((1,), (1, 2)) == 1
    assert shared((1,), (2,)) == 0
    assert shared((), (1,)) == 0
    assert common_beginning([Family(3, ((1, 2, 3, 4),)), Family(2, ((1, 2, 9),))]) == 2


def test_texts_that_share_nothing_are_not_worth_the_cache():
    found = families({tuple(range(i * 10, i * 10 + 10)): 1 for i in range(5)})
    assert saved_share(found, 4) == 0.0
