"""Cached decoding against the full forward, batches against single requests, and `transformers`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hcx.errors import ConfigError
from hcx.generate import ContiguousKVCache, EagerSteps, Generator, SamplingParams
from hcx.model.load import LoadedModel, load_model
from hcx.model.meta import ForwardMeta
from hcx.testing.tiny import tiny_config, tiny_decoder, tiny_model_directory

# fp32 on one CPU: the same products in another order.
TOLERANCE = 1e-5


def _bare(architecture: str = "llama", **overrides) -> LoadedModel:
    config = tiny_config(architecture, **overrides)
    decoder = tiny_decoder(config).requires_grad_(False).eval()
    return LoadedModel(decoder, config, None, Path("nowhere"), None)


def _prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 384, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def _full_logits(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    decoder = loaded.decoder
    return decoder.output(decoder(torch.tensor([tokens]), ForwardMeta())).logits()[0]


@pytest.mark.parametrize("architecture", ["llama", "hyperclovax"])
def test_cached_decode_equals_the_full_forward(architecture: str) -> None:
    # Logits of the usual size, for which the tolerance is meant.
    loaded = _bare(architecture, initializer_range=0.1)
    (tokens,) = _prompts(40)
    expected = _full_logits(loaded, tokens)
    cache = ContiguousKVCache(loaded.config, rows=3, max_seq=80, dtype=torch.float32)
    steps = EagerSteps(loaded.decoder)
    hidden = steps.prefill(torch.tensor([tokens[:25]]), torch.arange(25)[None], cache.view(1, 1, 25))
    torch.testing.assert_close(steps.logits(hidden[:, 0]), expected[:25], rtol=0, atol=TOLERANCE)
    for position in range(25, 40):
        view = cache.view(1, 1, position + 1)
        logits = steps.decode_step(torch.tensor([tokens[position]]), torch.tensor([position]), view)
        torch.testing.assert_close(logits[0], expected[position], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("architecture", ["llama", "hyperclovax"])
def test_a_batch_of_uneven_prompts_equals_one_at_a_time(architecture: str) -> None:
    loaded = _bare(architecture)
    prompts = _prompts(3, 41, 1, 17, 100)
    lengths = [20, 5, 33, 1, 12]
    params = [SamplingParams(max_tokens=length) for length in lengths]
    together = Generator(loaded, max_batch=3, prefill_tokens=24).generate(prompts, params)
    for prompt, one, answer in zip(prompts, params, together, strict=True):
        (alone,) = Generator(loaded, max_batch=1).generate([prompt], one)
        assert answer.token_ids == alone.token_ids
        assert len(answer.token_ids) == one.max_tokens
        assert answer.finish_reason == "length"
        # Independent of the cache: each token is the most likely one after everything before it.
        whole = [*prompt, *answer.token_ids]
        expected = _full_logits(loaded, whole[:-1]).argmax(-1)[len(prompt) - 1 :].tolist()
        assert list(answer.token_ids) == expected


def test_sampling_with_a_seed_does_not_depend_on_the_batch_around_it() -> None:
    loaded = _bare()
    prompts = _prompts(9, 4, 30)
    params = [SamplingParams(max_tokens=25, temperature=1.5, top_p=0.95, seed=seed) for seed in (1, 2, 3)]
    together = Generator(loaded, max_batch=3).generate(prompts, params)
    alone = [Generator(loaded, max_batch=1).generate([p], s)[0] for p, s in zip(prompts, params, strict=True)]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    other = Generator(loaded, max_batch=1).generate(
        [prompts[0]], SamplingParams(max_tokens=25, temperature=1.5, seed=9)
    )
    assert other[0].token_ids != alone[0].token_ids


def test_logprobs_are_those_of_the_full_forward() -> None:
    loaded = _bare("hyperclovax")
    (prompt,) = _prompts(150)
    params = SamplingParams(max_tokens=4, logprobs=3, prompt_logprobs=2)
    (answer,) = Generator(loaded, max_batch=2, prefill_tokens=40).generate([prompt], params)
    whole = [*prompt, *answer.token_ids]
    expected = torch.log_softmax(_full_logits(loaded, whole), -1)
    assert answer.prompt_logprobs[0].logprob is None
    assert [entry.token for entry in answer.prompt_logprobs] == prompt
    scored = [*answer.prompt_logprobs[1:], *answer.logprobs]
    assert [entry.token for entry in scored] == whole[1:]
    for place, entry in enumerate(scored):
        assert entry.logprob == pytest.approx(expected[place, entry.token].item(), abs=TOLERANCE)
        best = expected[place].topk(len(entry.top))
        assert [token for token, _ in entry.top] == best.indices.tolist()
    assert len(scored[0].top) == 2
    assert len(scored[-1].top) == 3


def test_a_prompt_that_fills_the_context_can_be_scored() -> None:
    loaded = _bare()
    prompts = _prompts(64, 10)
    answers = Generator(loaded, max_batch=2, max_seq=64).generate(
        prompts, SamplingParams(max_tokens=0, prompt_logprobs=0)
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = torch.log_softmax(_full_logits(loaded, prompt), -1)
        total = sum(entry.logprob for entry in answer.prompt_logprobs[1:])
        direct = sum(expected[place, token].item() for place, token in enumerate(prompt[1:]))
        assert total == pytest.approx(direct, abs=1e-3)
        assert answer.token_ids == ()


@pytest.mark.parametrize("architecture", ["llama", "hyperclovax"])
def test_greedy_text_equals_transformers(architecture: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tiny_model_directory(tmp_path, architecture)
    generator = Generator(load_model(tmp_path), max_batch=4)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["대한민국의 수도는", "def add(", "The capital", "한"]
    answers = generator.generate([generator.encode(text) for text in texts], SamplingParams(max_tokens=40))
    for text, answer in zip(texts, answers, strict=True):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        assert generator.encode(text) == ids[0].tolist()
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        new = expected[0, ids.shape[1] :]
        assert list(answer.token_ids) == new.tolist()
        assert answer.text == tokenizer.decode(new, skip_special_tokens=True)


def test_wrong_sizes_and_prompts_are_refused_with_the_limit() -> None:
    loaded = _bare()
    with pytest.raises(ConfigError, match="max_seq = 257; must be from 1 to the model's context of 256"):
        Generator(loaded, max_seq=257)
    generator = Generator(loaded, max_batch=1, max_seq=32)
    with pytest.raises(ConfigError, match="must not exceed the context of 32"):
        generator.generate([[1] * 30], SamplingParams(max_tokens=3))
    with pytest.raises(ConfigError, match="token id 384 is outside the vocabulary"):
        generator.generate([[1], [384]], SamplingParams(max_tokens=1))
    with pytest.raises(ConfigError, match="prompt is empty"):
        generator.generate([[]], SamplingParams(max_tokens=1))
    assert not generator.scheduler.has_work
