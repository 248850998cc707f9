"""The adapter against lm-eval's own `hf` backend on the same directory."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hcx.evals.lm import HcxLM
from hcx.testing.evaluation import PAIRS, PROMPTS, TEXTS, evaluable_directory

# fp32 sums of up to 256 log-probabilities; the bar asks for 1e-4 per request.
TOLERANCE = 1e-4

KINDS = [("llama", False), ("llama", True), ("hyperclovax", False), ("hyperclovax", True)]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: f"{kind[0]}-{'bos' if kind[1] else 'nobos'}")
def directory(request, tmp_path_factory):
    architecture, adds_bos = request.param
    return evaluable_directory(tmp_path_factory.mktemp("model"), architecture, adds_bos, max_seq_len=96)


@pytest.fixture(scope="module")
def backends(directory):
    return (
        HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1),
        {size: HcxLM(directory, batch_size=size, dtype="float32") for size in (1, 8)},
    )


def requests(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_loglikelihood_of_every_request_equals_the_hf_backend(backends, batch_size):
    reference, ours = backends
    reference.batch_size_per_gpu = batch_size
    expected = reference.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    found = ours[batch_size].loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_rolling_loglikelihood_of_every_text_equals_the_hf_backend(backends, batch_size):
    reference, ours = backends
    reference.batch_size_per_gpu = batch_size
    arguments = [(text,) for text in TEXTS]
    expected = reference.loglikelihood_rolling(requests("loglikelihood_rolling", arguments), disable_tqdm=True)
    found = ours[batch_size].loglikelihood_rolling(requests("loglikelihood_rolling", arguments), disable_tqdm=True)
    # A text's total is a sum over its windows: the tolerance is per window.
    assert found == pytest.approx(expected, abs=10 * TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_greedy_continuations_equal_the_hf_backend(backends, batch_size):
    reference, ours = backends
    reference.batch_size_per_gpu = batch_size
    arguments = [(prompt, {"until": ["\n", "다."], "max_gen_toks": 12, "do_sample": False}) for prompt in PROMPTS]
    expected = reference.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    found = ours[batch_size].generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert found == expected
    assert any(expected)


def test_a_greedy_continuation_is_recognised_as_greedy(backends):
    _, ours = backends
    prompt = "The capital of Korea is Seoul. A river"
    tokens = ours[1].tok_encode(prompt)
    (generated,) = ours[1].generate_until(requests("generate_until", [(prompt, {"max_gen_toks": 3})]))
    if ours[1].tok_encode(prompt + generated)[: len(tokens)] != tokens or not generated:
        pytest.skip("this random model's continuation does not tokenise back to itself")
    continuation = ours[1].tok_encode(prompt + generated)[len(tokens) :]
    ((_, greedy),) = ours[1]._loglikelihood_tokens([(None, tokens, continuation[:1])])
    assert greedy
