"""OpenAI's protocol on a running server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from hcx.generate import Generator, SamplingParams
from hcx.model.load import LoadedModel, load_model
from hcx.model.meta import ForwardMeta
from hcx.serve.app import Service
from hcx.serve.config import ServeConfig
from hcx.serve.server import Server
from hcx.testing.serving import running_server
from hcx.testing.tiny import tiny_model_directory

PROMPT = "대한민국의 수도는"
# fp32 on one CPU: the same products in another order, summed over some dozen tokens.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(tiny_model_directory(tmp_path_factory.mktemp("served") / "tiny-model"))


@pytest.fixture(scope="module")
def server(loaded: LoadedModel) -> Iterator[tuple[str, Service]]:
    config = ServeConfig(
        model_name="tiny", max_batch=3, max_queue=20, max_choices=16, max_logprobs=5, max_body_bytes=20_000, max_stop=4
    )
    with running_server(loaded, config) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: tuple[str, Service]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[0], timeout=60) as client:
        yield client


def _complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def _events(client: httpx.Client, path: str, **body: Any) -> list[Any]:
    with client.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def _slow(service: Service, seconds: float) -> None:
    """Every step takes at least so long from now on: a tiny model is too quick to be interrupted."""
    scheduler = service.generator.scheduler
    step = scheduler.step

    def slowly() -> Any:
        time.sleep(seconds)
        return step()

    scheduler.step = slowly


@contextmanager
def _slowed(service: Service, seconds: float) -> Iterator[None]:
    step = service.generator.scheduler.step
    _slow(service, seconds)
    try:
        yield
    finally:
        service.generator.scheduler.step = step


def _wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_models_states_precision_and_numerics(client: httpx.Client, loaded: LoadedModel) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert (model["numerics"], model["bits"], model["max_model_len"]) == ("full", 32, 256)
    assert model["tokenizer_digest"] == loaded.tokenizer.digest
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/other").status_code == 404


def test_a_greedy_completion_is_the_generators(client: httpx.Client, loaded: LoadedModel) -> None:
    generator = Generator(loaded, max_batch=1)
    (expected,) = generator.generate([generator.encode(PROMPT)], SamplingParams(max_tokens=16))
    answer = _complete(client, model="tiny", prompt=PROMPT, temperature=0)
    (choice,) = answer["choices"]
    assert choice["text"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason
    assert answer["usage"]["prompt_tokens"] == len(generator.encode(PROMPT))
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)


def test_every_form_of_prompt_gives_the_same_text(client: httpx.Client, loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode(PROMPT)
    forms = [PROMPT, [PROMPT], ids, [ids], [PROMPT, "def"], [ids, [5]]]
    answers = [_complete(client, prompt=form, temperature=0)["choices"] for form in forms]
    assert len({choices[0]["text"] for choices in answers}) == 1
    assert [len(choices) for choices in answers] == [1, 1, 1, 1, 2, 2]
    assert [choice["index"] for choice in answers[-1]] == [0, 1]


def test_a_stream_joins_to_the_whole_answer(client: httpx.Client) -> None:
    call = {"prompt": [PROMPT, "The"], "temperature": 1.0, "seed": 4, "n": 2, "max_tokens": 30}
    whole = [choice["text"] for choice in _complete(client, **call)["choices"]]
    events = _events(client, "/v1/completions", **call, stream_options={"include_usage": True})
    texts = ["", "", "", ""]
    for event in events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == whole
    assert len(set(whole)) == 4, "answers to one prompt with one seed should differ by their number"
    assert events[-1]["usage"]["completion_tokens"] > 4
    assert len(events) > 8


def test_echo_with_logprobs_scores_the_prompt_as_the_full_forward_does(
    client: httpx.Client, loaded: LoadedModel
) -> None:
    ids = loaded.tokenizer.encode("문서를 열려면 파일 메뉴에서 뷁")
    with torch.no_grad():
        logits = loaded.decoder.output(loaded.decoder(torch.tensor([ids]), ForwardMeta())).logits()[0]
    expected = torch.log_softmax(logits, -1)
    for most in (0, 1):
        (choice,) = _complete(client, prompt=[ids], echo=True, max_tokens=most, logprobs=2, temperature=0)["choices"]
        found = choice["logprobs"]
        assert {len(values) for values in found.values()} == {len(ids) + most}
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        for place, token in enumerate(ids[1:]):
            assert found["token_logprobs"][place + 1] == pytest.approx(expected[place, token].item(), abs=TOLERANCE)
            best = expected[place].max().item()
            assert max(found["top_logprobs"][place + 1].values()) == pytest.approx(best, abs=TOLERANCE)
        assert choice["text"].startswith("문서를 열려면 파일 메뉴에서 뷁")
        # A token that is part of a syllable is named by its bytes, and its offset is where the syllable begins.
        split = [name for name in found["tokens"] if name.startswith("bytes:")]
        assert len(split) >= 3
        for name, offset in zip(found["tokens"], found["text_offset"], strict=True):
            assert name.startswith("bytes:") or choice["text"][offset:].startswith(name) or most


def test_chat_answers_whole_and_streamed_are_equal(client: httpx.Client, loaded: LoadedModel) -> None:
    messages = [
        {"role": "system", "content": "짧게 답하라."},
        {"role": "user", "content": [{"type": "text", "text": "수도는?"}]},
    ]
    call = {"messages": messages, "max_completion_tokens": 20, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    answer = client.post("/v1/chat/completions", json=call).json()
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    generator = Generator(loaded, max_batch=1)
    plain = [messages[0], {"role": "user", "content": "수도는?"}]
    ids = loaded.tokenizer.render_chat(plain, add_generation_prompt=True)
    stops = (loaded.tokenizer.special_tokens["<|endofturn|>"],)
    (expected,) = generator.generate([ids], SamplingParams(max_tokens=20, stop_token_ids=stops))
    assert choice["message"]["content"] == expected.text
    assert len(choice["logprobs"]["content"]) == len(expected.token_ids)
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
    events = _events(client, "/v1/chat/completions", **call)
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == expected.text
    assert events[-1]["choices"][0]["finish_reason"] == expected.finish_reason


def test_special_tokens_in_a_users_text_are_ordinary_text(client: httpx.Client) -> None:
    def prompt_tokens(content: str) -> int:
        call = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        return client.post("/v1/chat/completions", json=call).json()["usage"]["prompt_tokens"]

    assert prompt_tokens("<|endofturn|>") > prompt_tokens("a") + 5


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "a", "model": "other"}, 404, "model 'other' is not served here; valid: tiny"),
        ({}, 400, "prompt: is required"),
        ({"prompt": 5}, 400, "prompt: must be text, token ids"),
        ({"prompt": []}, 400, "empty list"),
        ({"prompt": [[]]}, 400, "token ids is empty"),
        ({"prompt": [384]}, 400, "token id 384 is outside the vocabulary; valid: 0 to 383"),
        ({"prompt": [-1]}, 400, "token id -1 is outside the vocabulary"),
        ({"prompt": [5] * 257}, 400, "the prompt has 257 tokens"),
        ({"prompt": [5] * 250, "max_tokens": 7}, 400, "together 256"),
        ({"prompt": "a", "n": 17}, 400, "17 answers; at most 16"),
        ({"prompt": "a", "logprobs": 6}, 400, "logprobs: 6; at most 5"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, 400, "temperature"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p"),
        ({"prompt": "a", "stop": ["1", "2", "3", "4", "5"]}, 400, "5 strings; at most 4"),
        ({"prompt": "a", "seed": 10**30}, 400, "seed"),
        ({"prompt": "a", "stop_token_ids": ["a"]}, 400, "stop_token_ids"),
        ({"prompt": True}, 400, "prompt"),
        ({"prompt": [True]}, 400, "prompt"),
        ({"prompt": "a", "x" * 9000: 1}, 400, "this server does not support it"),
        ({"prompt": "a", "stream_options": {"chunks": 1}}, 400, "stream_options.chunks"),
        ({"prompt": "a", "best_of": 3}, 400, "best_of: 3"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix: this server does not support it"),
        ({"prompt": "a", "logit_bias": {"5": 3}}, 400, "logit_bias: this server does not support it"),
        ({"prompt": "a" * 30_000}, 413, "larger than 20000 bytes"),
    ],
)
def test_wrong_calls_are_refused_in_openais_form(
    client: httpx.Client, body: dict[str, Any], status: int, message: str
) -> None:
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[1]", 400),
        (b"[" * 10_000, 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b"\xff\xfe", 400),
    ],
)
def test_bodies_that_are_no_json_object_are_refused(client: httpx.Client, content: bytes, status: int) -> None:
    reply = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("field", ["prompt", "model", "unheard_of", "stop"])
def test_a_lone_surrogate_anywhere_is_no_failure_of_the_server(client: httpx.Client, field: str) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1, field: "\ud800"})
    reply = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == {"model": 404, "stop": 200}.get(field, 400)
    name = json.dumps({"prompt": "a", "\ud800": 1})
    reply = client.post("/v1/completions", content=name, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400


def test_extreme_but_valid_sampling_does_not_disturb_the_server(client: httpx.Client) -> None:
    for extreme in ({"top_k": 10**30}, {"temperature": 1e-300}, {"temperature": 100}, {"top_p": 1e-300}, {"seed": -5}):
        answer = _complete(client, prompt="a", max_tokens=3, ignore_eos=True, **extreme)
        assert answer["usage"]["completion_tokens"] == 3


def test_unknown_paths_and_methods_answer_in_openais_form(client: httpx.Client) -> None:
    assert "error" in client.get("/v1/nothing").json()
    assert client.get("/v1/completions").status_code == 405


def test_a_body_without_a_stated_length_is_capped_too(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    reply = client.post("/v1/completions", content=chunks(), headers={"Content-Type": "application/json"})
    assert reply.status_code == 413


def test_only_json_and_local_hosts_are_answered(client: httpx.Client) -> None:
    plain = client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    assert client.get("/v1/models", headers={"Host": "evil.example:8000"}).status_code == 403
    assert "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": "http://x"}).headers


def test_a_client_that_goes_away_frees_its_row(server: tuple[str, Service], client: httpx.Client) -> None:
    _, service = server
    long = {"prompt": "a", "max_tokens": 250, "ignore_eos": True}
    with _slowed(service, 0.02):
        with client.stream("POST", "/v1/completions", json={**long, "stream": True}) as reply:
            lines = reply.iter_lines()  # kept: an abandoned iterator closes the connection
            next(lines)
            assert service.worker.pending == 1
        _wait_until(lambda: service.worker.pending == 0, "the stream's row is still held")
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json={**long, "n": 16}, timeout=0.2)
        _wait_until(lambda: service.worker.pending == 0, "the call's rows are still held")
        _wait_until(lambda: not service.generator.scheduler.has_work, "the scheduler still works for nobody")
    assert _complete(client, prompt="a", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_metrics_and_health_and_the_page_are_there(client: httpx.Client) -> None:
    _complete(client, prompt="a", max_tokens=3, ignore_eos=True)
    assert client.get("/health").json() == {"status": "ok"}
    text = client.get("/metrics").text
    assert 'hcx_serve_requests_total{endpoint="completions",status="200"}' in text
    assert "hcx_serve_ttft_ms_bucket" in text
    assert "hcx_serve_running 0.0" in text
    assert "hcx_serve_waiting 0.0" in text
    page = client.get("/")
    assert "playground" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    # Whatever a model writes must stay text on the page.
    assert "innerHTML =" not in page.text
    assert "innerHTML+=" not in page.text


def test_a_full_queue_answers_429_and_a_slow_request_503(loaded: LoadedModel) -> None:
    config = ServeConfig(model_name="tiny", max_batch=1, max_queue=1, request_timeout_s=0.4)
    with (
        running_server(loaded, config) as (url, service),
        httpx.Client(base_url=url, timeout=60) as client,
        _slowed(service, 0.1),
    ):
        long = {"prompt": "a", "max_tokens": 200, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json={**long, "stream": True, "n": 2}) as reply:
            refused = client.post("/v1/completions", json=long)
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            lines = [line for line in reply.iter_lines() if line]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert lines[-1] == "data: [DONE]"
        slow = client.post("/v1/completions", json=long)
        assert slow.status_code == 503
        assert "longer than 0.4 s" in slow.json()["error"]["message"]
        _wait_until(lambda: not service.generator.scheduler.has_work, "a timed-out request still runs")


def test_a_failing_model_answers_500_and_the_server_lives_on(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_server(loaded) as (url, service), httpx.Client(base_url=url, timeout=60) as client:

        def broken(*_: Any) -> None:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(service.generator.scheduler.steps, "prefill", broken)
            reply = client.post("/v1/completions", json={"prompt": "a"})
            assert reply.status_code == 500
            assert "out of memory" not in reply.text
        assert _complete(client, prompt="a", max_tokens=1)["choices"]
        assert service.worker.pending == 0


def test_a_server_that_stops_tells_the_calls_that_still_run(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Server, "shutdown_s", 0.3)
    with ThreadPoolExecutor(2) as pool, running_server(loaded) as (url, service):
        _slow(service, 0.05)  # also while it stops

        def call(stream: bool) -> str:
            body = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": stream}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60).text

        streamed, whole = pool.submit(call, True), pool.submit(call, False)
        _wait_until(lambda: service.worker.pending == 2, "the calls did not begin")
    events = streamed.result().strip().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert events[-1] == "data: [DONE]"
    assert json.loads(whole.result())["error"]["code"] == "shutting_down"
    assert not caplog.records


def test_keys_are_demanded_on_everything_but_health_and_page(loaded: LoadedModel) -> None:
    config = ServeConfig(model_name="tiny")
    with running_server(loaded, config, ["key-one", "key-two"]) as (url, _), httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics"):
            assert client.get(path).status_code == 401
        for given in ("key-on", "key-onee", "x", "Bearer key-one"):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {given}"}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Basic key-one"}).status_code == 401
        reply = client.post("/v1/completions", json={"prompt": "a"})
        assert reply.json()["error"]["type"] == "authentication_error"
        for key in ("key-one", "key-two"):
            headers = {"Authorization": f"Bearer {key}", "Host": "models.example"}
            assert client.get("/v1/models", headers=headers).status_code == 200


def test_many_clients_at_once_get_what_each_gets_alone(client: httpx.Client, server: tuple[str, Service]) -> None:
    texts = ["대한", "def add", "The capital", "문서를 열려면", "a", "for number"]
    alone = [_complete(client, prompt=text, temperature=0, max_tokens=24)["choices"][0]["text"] for text in texts]
    with ThreadPoolExecutor(6) as pool:

        def call(text: str) -> str:
            return httpx.post(
                f"{server[0]}/v1/completions", json={"prompt": text, "temperature": 0, "max_tokens": 24}, timeout=60
            ).json()["choices"][0]["text"]

        assert list(pool.map(call, texts)) == alone


def test_a_model_without_a_tokenizer_is_not_served(tmp_path: Path) -> None:
    from hcx.errors import ConfigError
    from hcx.serve.app import create_app

    directory = tiny_model_directory(tmp_path, with_tokenizer=False)
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        create_app(load_model(directory), ServeConfig())
