"""The adapter against lm-eval's own `hf` backend on the same directory."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from hcx.errors import EvalError
from hcx.evals.lm import HcxLM
from hcx.model.meta import ForwardMeta
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


def test_the_most_likely_token_is_recognised_as_greedy_and_another_is_not(backends):
    _, ours = backends
    context = ours[1].tok_encode("The capital of Korea is")
    hidden = ours[1].decoder(torch.tensor([context]), ForwardMeta())
    best = int(ours[1].decoder.output(hidden).logits()[0, -1].argmax())
    other = (best + 1) % ours[1].config.vocab_size
    answers = ours[1]._loglikelihood_tokens([(None, context, [best]), (None, context, [other])])
    assert [greedy for _, greedy in answers] == [True, False]


def test_logits_in_chunks_equal_logits_at_once(backends, monkeypatch):
    _, ours = backends
    whole = ours[8].loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    monkeypatch.setattr("hcx.evals.lm.LOGIT_CHUNK", 3)
    assert [v for v, _ in ours[8].loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)] == pytest.approx(
        [v for v, _ in whole], abs=TOLERANCE
    )


def test_a_continuation_longer_than_the_model_is_refused_in_words(backends):
    _, ours = backends
    with pytest.raises(EvalError, match="loglikelihood_rolling"):
        ours[1].loglikelihood(requests("loglikelihood", [("x", " long" * 400)]), disable_tqdm=True)


def test_a_device_or_type_that_does_not_exist_is_refused_in_words(directory):
    with pytest.raises(EvalError, match="'tpu9'; valid: cpu"):
        HcxLM(directory, device="tpu9")
    with pytest.raises(EvalError, match="shows"):
        HcxLM(directory, device="cuda:999")
    with pytest.raises(EvalError, match="valid: float32"):
        HcxLM(directory, dtype="int9")


def test_sampling_is_repeatable_and_differs_between_requests_with_equal_prompts(backends):
    _, ours = backends
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    first, second = (
        ours[8].generate_until(requests("generate_until", [("The capital", dict(options))] * 2)) for _ in range(2)
    )
    assert first == second
    assert first[0] != first[1]


def test_a_generation_option_that_cannot_be_followed_is_refused(backends):
    _, ours = backends
    with pytest.raises(EvalError, match="num_beams = 4"):
        ours[1].generate_until(requests("generate_until", [("x", {"num_beams": 4, "max_gen_toks": 4})]))
