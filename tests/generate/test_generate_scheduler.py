"""Requests that join, leave and are cancelled while others run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from hcx.generate import Generator, Request, SamplingParams
from hcx.model.load import LoadedModel, load_model
from hcx.testing.tiny import tiny_config, tiny_decoder, tiny_model_directory


@pytest.fixture(scope="module")
def bare() -> LoadedModel:
    config = tiny_config()
    return LoadedModel(tiny_decoder(config).requires_grad_(False).eval(), config, None, Path("nowhere"), None)


def _random_requests(generator: Generator, number: int, seed: int) -> list[Request]:
    source = random.Random(seed)
    return [
        generator.request(
            [source.randrange(384) for _ in range(source.randint(1, 60))],
            SamplingParams(max_tokens=source.randint(0, 30), logprobs=1, prompt_logprobs=0),
        )
        for _ in range(number)
    ]


@pytest.mark.parametrize("prefill_tokens", [1, 13, 512])
def test_requests_that_join_leave_and_are_cancelled_do_not_disturb_each_other(
    bare: LoadedModel, prefill_tokens: int
) -> None:
    generator = Generator(bare, max_batch=4, prefill_tokens=prefill_tokens)
    scheduler = generator.scheduler
    requests = _random_requests(generator, 14, seed=prefill_tokens)
    source = random.Random(7)
    cancelled = set(source.sample(range(14), 4))
    arrivals = list(enumerate(requests))
    pieces: dict[int, list[int]] = {index: [] for index in range(14)}
    where = {id(request): index for index, request in enumerate(requests)}
    for _step in range(2000):
        while arrivals and source.random() < 0.4:
            scheduler.submit(arrivals.pop(0)[1])
        for index in cancelled:
            if source.random() < 0.1 and requests[index].finish_reason is None and not requests[index].cancelled:
                scheduler.cancel(requests[index])
        for request, piece in scheduler.step():
            pieces[where[id(request)]] += piece.token_ids
        assert len(scheduler.rows) <= 4
        if not arrivals and not scheduler.has_work:
            break
    assert not scheduler.has_work
    alone = Generator(bare, max_batch=1)
    finished = 0
    for index, request in enumerate(requests):
        if request.cancelled:
            continue
        finished += 1
        (expected,) = alone.generate([request.prompt], request.params)
        answer = request.completion()
        assert answer.token_ids == expected.token_ids == tuple(pieces[index])
        for mine, theirs in zip(answer.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert finished >= 10


def test_a_running_request_advances_while_a_long_prompt_is_read(bare: LoadedModel) -> None:
    generator = Generator(bare, max_batch=2, prefill_tokens=8)
    running = generator.request([1, 2, 3], SamplingParams(max_tokens=100))
    generator.scheduler.submit(running)
    generator.scheduler.step()
    reading = generator.request([5] * 80, SamplingParams(max_tokens=1))
    generator.scheduler.submit(reading)
    before = len(running.tokens)
    for _ in range(9):
        generator.scheduler.step()
    assert reading.computed < 80
    assert len(running.tokens) == before + 9


def test_cancelling_frees_the_row_for_a_waiting_request(bare: LoadedModel) -> None:
    generator = Generator(bare, max_batch=1)
    first, second = (generator.request([1, 2], SamplingParams(max_tokens=50)) for _ in range(2))
    for request in (first, second):
        generator.scheduler.submit(request)
    generator.scheduler.step()
    assert generator.scheduler.rows == [first]
    generator.scheduler.cancel(first)
    generator.scheduler.step()
    assert generator.scheduler.rows == [second]


def test_closing_a_stream_early_frees_its_row(bare: LoadedModel) -> None:
    generator = Generator(bare, max_batch=1)
    stream = generator.stream([1, 2, 3], SamplingParams(max_tokens=50))
    next(stream)
    assert generator.scheduler.rows
    stream.close()
    assert not generator.scheduler.has_work


def test_stop_tokens_and_stop_strings_end_an_answer(tmp_path: Path) -> None:
    tiny_model_directory(tmp_path)
    generator = Generator(load_model(tmp_path), max_batch=2)
    prompt = generator.encode("대한민국의")
    (free,) = generator.generate([prompt], SamplingParams(max_tokens=30, ignore_eos=True))
    cut = free.token_ids[10]
    (by_id,) = generator.generate([prompt], SamplingParams(max_tokens=30, stop_token_ids=(cut,)))
    assert by_id.token_ids == free.token_ids[: free.token_ids.index(cut) + 1]
    assert by_id.finish_reason == "stop"
    word = free.text[8:10]
    (by_text,) = generator.generate([prompt], SamplingParams(max_tokens=30, stop=(word,)))
    assert by_text.text == free.text[: free.text.index(word)]
    assert by_text.finish_reason == "stop"
    streamed = "".join(piece.text for piece in generator.stream(prompt, SamplingParams(max_tokens=30, stop=(word,))))
    assert streamed == by_text.text


def test_an_empty_prompt_is_the_end_of_text_token(tmp_path: Path) -> None:
    tiny_model_directory(tmp_path)
    loaded = load_model(tmp_path)
    assert Generator(loaded).encode("") == [loaded.tokenizer.eos_id]


def test_a_tokenizer_that_begins_every_text_with_a_token_does_so_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny_model_directory(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|user|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|user|>": {"id": "<|user|>", "ids": [1], "tokens": ["<|user|>"]}},
    }
    path.write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "manifest.json").unlink(missing_ok=True)
    loaded = load_model(tmp_path)
    user = loaded.tokenizer.special_tokens["<|user|>"]
    assert user == 1
    ids = Generator(loaded).encode("대한")
    assert ids == [user, *loaded.tokenizer.encode("대한")]
    assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path)("대한").input_ids
