"""How rows are batched and on which side they are filled up changes no answer, and in deterministic mode no bit."""

import itertools

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from hcx.errors import EvalError
from hcx.evals.lm import HcxLM
from hcx.model.load import load_model
from hcx.testing.evaluation import PAIRS, PROMPTS, TEXTS, evaluable_directory

CLOSE = 1e-4
"""fp32: sums of another order, per forward pass."""

SHOTS = "".join(f"질문: {i}번 도시의 이름은 무엇인가?\n정답: 서울 {i}\n\n" for i in range(2))
QUESTIONS = [
    (f"{SHOTS}질문: {n}번 {'긴 ' * n}질문이다.\n정답:", f" {answer}")
    for n in range(3)
    for answer in ("서울이다", "부산이다. 바다가 있다", "To open a file", "서울이다. 한강")
]
WAYS = [
    {"batch_size": size, "padding": side, "prefix_reuse": reuse}
    for size, side, reuse in itertools.product((1, 8, 64), ("right", "left"), (True, False))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(evaluable_directory(tmp_path_factory.mktemp("padding") / "model", "hyperclovax", max_seq_len=192))


def requests(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def answers(lm):
    options = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    return {
        "pairs": lm.loglikelihood(requests("loglikelihood", [*PAIRS, *QUESTIONS])),
        "texts": lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text[:400],) for text in TEXTS])),
        "outputs": lm.generate_until(requests("generate_until", [(prompt, options) for prompt in PROMPTS])),
    }


def chosen(pairs):
    """The option of each question, and whether each continuation is the greedy one."""
    scores = [value for value, _ in pairs[len(PAIRS) :]]
    options = [max(range(4), key=scores[start : start + 4].__getitem__) for start in range(0, len(scores), 4)]
    return options, [greedy for _, greedy in pairs]


@pytest.fixture(scope="module")
def expected(model):
    return answers(HcxLM(model, batch_size=1, prefix_reuse=False))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())))
def test_answers_are_equal_and_numbers_close_however_rows_are_batched_and_padded(model, expected, way):
    found = answers(HcxLM(model, **way))
    assert chosen(found["pairs"]) == chosen(expected["pairs"])
    assert found["outputs"] == expected["outputs"]
    assert [v for v, _ in found["pairs"]] == pytest.approx([v for v, _ in expected["pairs"]], abs=CLOSE)
    # A text's total is a sum over its windows.
    assert found["texts"] == pytest.approx(expected["texts"], abs=10 * CLOSE)


def test_in_deterministic_mode_every_way_gives_the_same_bits(model):
    ways = [way for way in WAYS if way["prefix_reuse"]]  # nothing is shared in this mode
    first, *others = (answers(HcxLM(model, **way, deterministic=True)) for way in ways)
    assert all(other == first for other in others)


@pytest.mark.parametrize(("side", "reuse"), itertools.product(("right", "left"), (True, False)))
def test_rows_are_padded_on_the_side_that_was_asked_for(model, side, reuse, monkeypatch):
    lm = HcxLM(model, batch_size=8, padding=side, prefix_reuse=reuse)
    seen = []
    forward = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda tokens, meta: seen.append(tokens) or forward(tokens, meta))
    lm.loglikelihood(requests("loglikelihood", QUESTIONS))
    edge = 0 if side == "left" else -1
    assert any((tokens[:, edge] == 0).any() and not (tokens[:, -1 - edge] == 0).any() for tokens in seen)


def test_another_side_is_refused(model):
    with pytest.raises(EvalError, match="padding = 'middle'; one of: right, left"):
        HcxLM(model, padding="middle")
