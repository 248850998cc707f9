"""One chat format: training, evaluation, serving and transformers see the same ids for the same messages."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch

from hcx.data.chat_rows import Conversation
from hcx.data.chat_samples import encode_conversations
from hcx.generate import Generator
from hcx.model.adapters import Adapter
from hcx.model.convert.peft import write_adapter
from hcx.model.load import LoadedModel, load_model
from hcx.serve.config import ServeConfig
from hcx.testing.serving import running_server
from hcx.testing.tiny import tiny_config, tiny_decoder, tiny_model_directory
from hcx.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from hcx.evals.lm import HcxLM  # noqa: E402  # needs lm-eval

QUESTION = [
    {"role": "user", "content": "대한민국의 수도는?"},
    {"role": "assistant", "content": "서울이다."},
    {"role": "user", "content": "  Open\n\nthe file, 이모지 🙂 "},
]
ANSWER = {"role": "assistant", "content": "Choose Open."}
SYSTEM = {"role": "system", "content": "짧게 답하라."}


@pytest.fixture(scope="module", params=["", "다음은 대화입니다."], ids=["bare", "preamble"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tiny_model_directory(tmp_path_factory.mktemp("chat") / "model")
    Tokenizer.load(directory).with_preamble(request.param).save(directory)
    return load_model(directory)


def served(loaded: LoadedModel, messages: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The prompt that the server gives the model, seen where it enters the scheduler."""
    seen: list[list[int]] = []
    request = Generator.request

    def watched(self: Generator, prompt: list[int], *rest: object) -> object:
        seen.append(list(prompt))
        return request(self, prompt, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Generator, "request", watched)
    with running_server(loaded, ServeConfig(model_name="tiny")) as (url, _):
        body = {"model": "tiny", "messages": messages, "max_tokens": 1}
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200
    assert len(seen) == 1
    assert reply.json()["usage"]["prompt_tokens"] == len(seen[0])
    return seen[0]


@pytest.mark.parametrize("messages", [QUESTION, [SYSTEM, *QUESTION]], ids=["without", "with-system"])
def test_training_evaluation_serving_and_transformers_see_the_same_ids(
    loaded: LoadedModel, messages: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded.tokenizer is not None
    ids = served(loaded, messages, monkeypatch)
    conversation = Conversation((*messages, ANSWER), "test", "here")
    samples = encode_conversations([conversation], loaded.tokenizer, 200)
    assert samples.ids[: len(ids)].tolist() == ids
    # What is trained begins where the served prompt ends.
    last_turn = [n for n in range(len(samples.ids)) if samples.trained[n] and not samples.trained[n - 1]][-1]
    assert last_turn == len(ids)
    lm = HcxLM(loaded)
    assert lm.tok_encode(lm.apply_chat_template(messages)) == ids
    theirs = transformers.AutoTokenizer.from_pretrained(str(Path(loaded.directory)), local_files_only=True)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids


def test_an_adapter_is_served_and_evaluated_with_the_format_it_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model_directory(tmp_path / "model")
    stem = "model.layers.0.mlp.down_proj"
    shape = tiny_decoder(tiny_config()).linears()[stem].blocks[0].global_shape
    tensors = {f"{stem}.lora_A.weight": torch.randn(2, shape[1]), f"{stem}.lora_B.weight": torch.randn(shape[0], 2)}
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", Adapter(2, 4.0, ("down_proj",), tensors, tmp_path), "model")
    tuned = Tokenizer.load(directory).with_preamble("다음은 대화입니다.")
    tuned.save(tmp_path / "adapter")
    loaded = load_model(directory, adapter=tmp_path / "adapter")
    ids = served(loaded, QUESTION, monkeypatch)
    assert ids == tuned.render_chat(QUESTION) != Tokenizer.load(directory).render_chat(QUESTION)
    lm = HcxLM(directory, adapter=tmp_path / "adapter")
    assert lm.tok_encode(lm.apply_chat_template(QUESTION)) == ids
    with running_server(loaded, ServeConfig(model_name="tuned")) as (url, _):
        (model,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert (model["id"], model["adapter"]) == ("tuned", "adapter")
