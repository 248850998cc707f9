"""lm-eval's own `local-completions` client against a running server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hcx.model.load import load_model
from hcx.model.meta import ForwardMeta
from hcx.serve.config import ServeConfig
from hcx.testing.serving import running_server
from hcx.testing.tiny import tiny_model_directory

pytest.importorskip("lm_eval")

# fp32 on one CPU: the same products in another order, summed over some dozen tokens.
TOLERANCE = 1e-4

PAIRS = [
    ("대한민국의 수도는", " 서울이다."),
    ("문서를 열려면 파일 메뉴에서", " 열기를 누르십시오."),
    ("The capital of Korea is", " Seoul."),
    ("def add(left, right):\n", "    return left + right"),
    ("", "뷁"),
]


@pytest.mark.parametrize(("batch_size", "connections"), [(1, 1), (3, 1), (2, 4)])
def test_local_completions_gets_the_loglikelihoods_of_direct_scoring(
    tmp_path: Path, batch_size: int, connections: int
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    directory = tiny_model_directory(tmp_path / "model")
    loaded = load_model(directory)
    with running_server(loaded, ServeConfig(model_name="any", max_batch=2)) as (url, _):
        client = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model=str(directory),
            tokenizer_backend="huggingface",
            tokenized_requests=True,
            batch_size=batch_size,
            num_concurrent=connections,
            max_length=256,
            max_retries=1,
        )
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
        answers = client.loglikelihood(requests)
        encoded = [client._encode_pair(*pair) if pair[0] else None for pair in PAIRS]
        until = [Instance("generate_until", {}, ("대한", {"until": ["\n\n"], "max_gen_toks": 12}), 0)]
        (generated,) = client.generate_until(until)
    for (logprob, is_greedy), pair, ids in zip(answers, PAIRS, encoded, strict=True):
        context, answer = ids or ([loaded.tokenizer.eos_id], loaded.tokenizer.encode(pair[1]))
        with torch.no_grad():
            tokens = torch.tensor([context + answer])
            logits = loaded.decoder.output(loaded.decoder(tokens, ForwardMeta())).logits()[0, len(context) - 1 : -1]
        scores = torch.log_softmax(logits, -1)
        labels = torch.tensor(answer)
        assert logprob == pytest.approx(scores.gather(1, labels[:, None]).sum().item(), abs=TOLERANCE)
        assert is_greedy == torch.equal(logits.argmax(-1), labels)
    from hcx.generate import Generator, SamplingParams

    generator = Generator(loaded, max_batch=1)
    (expected,) = generator.generate(
        [loaded.tokenizer.encode("대한")], SamplingParams(max_tokens=12, stop=("\n\n", "<|endoftext|>"))
    )
    assert generated == expected.text


def test_a_continuation_that_is_greedy_is_reported_as_such(tmp_path: Path) -> None:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from hcx.generate import Generator, SamplingParams

    directory = tiny_model_directory(tmp_path / "model")
    loaded = load_model(directory)
    context = loaded.tokenizer.encode("The capital")
    (greedy,) = Generator(loaded, max_batch=1).generate([context], SamplingParams(max_tokens=9, ignore_eos=True))
    other = [*greedy.token_ids[:-1], (greedy.token_ids[-1] + 1) % 384]
    with running_server(loaded) as (url, _):
        client = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions", model=str(directory), tokenizer_backend="huggingface", max_retries=1
        )
        requests = [(None, context, list(greedy.token_ids)), (None, context, other)]
        answers = client._loglikelihood_tokens(requests)
    assert [is_greedy for _, is_greedy in answers] == [True, False]
