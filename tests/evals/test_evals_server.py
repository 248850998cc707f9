"""lm-eval over HTTP against `hcx serve` gives the numbers that the adapter gives in this process."""

import os
import threading

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from hcx.evals.lm import HcxLM
from hcx.model.load import load_model
from hcx.serve.config import ServeConfig
from hcx.serve.server import bind, make_server
from hcx.testing.evaluation import PAIRS, PROMPTS, TEXTS, evaluable_directory

TOLERANCE = 1e-4
CONTEXT = 256


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return evaluable_directory(tmp_path_factory.mktemp("served"), "hyperclovax", max_seq_len=CONTEXT)


@pytest.fixture(scope="module")
def address(directory):
    """A running server."""
    listener = bind("127.0.0.1", 0)
    server = make_server(load_model(directory), ServeConfig(model_name="tiny"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=30)


@pytest.fixture(scope="module", params=[1, 8])
def remote(request, address, directory):
    return LocalCompletionsAPI(
        base_url=f"{address}/v1/completions",
        model="tiny",
        tokenizer=str(directory),
        tokenizer_backend="huggingface",
        max_length=CONTEXT,
        batch_size=request.param,
    )


@pytest.fixture(scope="module")
def local(directory):
    # lm-eval over HTTP keeps one position for the token that the protocol makes the server generate.
    return HcxLM(directory, batch_size=8, dtype="float32", max_length=CONTEXT - 2)


def requests(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_log_probabilities_over_http_equal_those_in_process(remote, local):
    found = remote.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    expected = local.loglikelihood(requests("loglikelihood", PAIRS))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=TOLERANCE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_log_probabilities_over_http_equal_those_in_process(remote, local):
    arguments = [(text,) for text in TEXTS[:2]]
    found = remote.loglikelihood_rolling(requests("loglikelihood_rolling", arguments), disable_tqdm=True)
    expected = local.loglikelihood_rolling(requests("loglikelihood_rolling", arguments))
    assert found == pytest.approx(expected, abs=TOLERANCE)


def test_continuations_over_http_equal_those_in_process(remote, local):
    arguments = [(prompt, {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}) for prompt in PROMPTS[:3]]
    found = remote.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert found == local.generate_until(requests("generate_until", arguments))
