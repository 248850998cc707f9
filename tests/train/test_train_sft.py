"""The loss on conversations: what is trained, against independent sums, whatever the split into batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hcx.data.batch import MicroBatch
from hcx.data.chat_rows import ChatSource, Conversation, read_conversations
from hcx.data.chat_samples import encode_conversations
from hcx.engine.common import plain_meta
from hcx.model.load import load_model
from hcx.testing.tiny import TINY_TEXT, tiny_model_directory
from hcx.tokenizer import Tokenizer, train_tokenizer
from hcx.train import SFT, NextToken

CHAT = (
    {"role": "system", "content": "짧게 답하라."},
    {"role": "user", "content": "대한민국의 수도는?"},
    {"role": "assistant", "content": "서울이다."},
    {"role": "user", "content": "Open the document."},
    {"role": "assistant", "content": "Choose Open from the File menu."},
    {"role": "user", "content": "고맙다"},
    {"role": "assistant", "content": "문서를 저장하십시오."},
)


class Logits:
    """A model output that is nothing but its logits."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def token_logprobs(self, labels: Tensor) -> Tensor:
        """See `ModelOutput.token_logprobs`."""
        return self._logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]

    def logits(self) -> Tensor:
        """See `ModelOutput.logits`."""
        return self._logits

    def values(self) -> Tensor:
        """See `ModelOutput.values`."""
        raise TypeError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_directory(tmp_path_factory.mktemp("sft") / "model")


def one_row(tokenizer: Tokenizer, messages: tuple[dict[str, str], ...]) -> MicroBatch:
    samples = encode_conversations([Conversation(messages, "test", "here")], tokenizer, 200)
    return samples.micro_batch([0], 1, int(samples.lengths[0]) + 5)


def test_gradients_of_user_targets_are_exactly_zero(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    batch = one_row(tokenizer, CHAT)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*batch.tokens.shape, tokenizer.vocab_size, generator=generator, requires_grad=True)
    SFT()(Logits(logits), batch)[0].backward()
    assert logits.grad is not None
    untrained = batch.weights == 0
    assert torch.equal(logits.grad[untrained], torch.zeros_like(logits.grad[untrained]))
    assert (logits.grad[~untrained].abs().amax(-1) > 0).all()


def test_the_decoders_own_output_gives_user_targets_exactly_zero_gradient(directory: Path) -> None:
    loaded = load_model(directory)
    assert loaded.tokenizer is not None
    batch = one_row(loaded.tokenizer, CHAT)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch.tokens.shape[1], 1, loaded.config.hidden_size, generator=generator, requires_grad=True)
    SFT()(loaded.decoder.output(hidden), batch)[0].backward()
    assert hidden.grad is not None
    per_target = hidden.grad[:, 0].abs().amax(-1)
    assert torch.equal(per_target > 0, batch.weights[0] > 0)


def test_the_loss_is_the_sum_of_the_turns_each_computed_alone_by_transformers(directory: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(directory), local_files_only=True).double()
    theirs = transformers.AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    expected, answers = 0.0, 0
    for number, message in enumerate(CHAT):
        if message["role"] != "assistant":
            continue
        # One turn alone: its prompt as transformers writes it, nothing after it, the whole softmax in fp64.
        prompt = theirs.apply_chat_template(list(CHAT[:number]), add_generation_prompt=True, return_dict=False)
        answer = theirs.encode(message["content"], add_special_tokens=False)
        answer.append(theirs.convert_tokens_to_ids("<|endofturn|>"))
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected -= sum(float(logprobs[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
        answers += len(answer)
    loaded = load_model(directory)
    assert loaded.tokenizer is not None
    batch = one_row(loaded.tokenizer, CHAT)
    with torch.no_grad():
        output = loaded.decoder.output(loaded.decoder(batch.tokens, plain_meta(batch)))
        found, metrics = SFT()(output, batch)
    assert SFT().weight(batch) == answers
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert 0 <= float(metrics["likely"]) <= answers


def test_a_multi_turn_sample_is_the_sum_of_its_turns(directory: Path) -> None:
    loaded = load_model(directory)
    assert loaded.tokenizer is not None

    def loss(batch: MicroBatch) -> float:
        with torch.no_grad():
            output = loaded.decoder.output(loaded.decoder(batch.tokens, plain_meta(batch)))
            return float(SFT()(output, batch)[0])

    whole = loss(one_row(loaded.tokenizer, CHAT))
    until = [loss(one_row(loaded.tokenizer, CHAT[: number + 1])) for number in (2, 4, 6)]
    assert until[0] < until[1] < until[2]
    assert whole == pytest.approx(until[-1], rel=1e-6)
    turns = [until[0]]
    for number in (4, 6):
        # This turn only: earlier answers are given, not trained.
        batch = one_row(loaded.tokenizer, CHAT[: number + 1])
        given = one_row(loaded.tokenizer, CHAT[: number - 1]).weights
        weights = batch.weights.clone()
        weights[:, : given.shape[1]] *= given == 0
        turns.append(loss(MicroBatch(batch.tokens, batch.labels, weights, batch.positions)))
    assert sum(turns) == pytest.approx(whole, rel=1e-6)


def test_likely_bounds_the_accuracy_from_below() -> None:
    labels = torch.tensor([[0, 1, 2]])
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 0] = logits[0, 1, 3] = 5.0
    batch = MicroBatch(labels, labels, torch.tensor([[1.0, 1.0, 1.0]]), labels)
    assert float(SFT()(Logits(logits), batch)[1]["likely"]) == 1.0
    assert float(SFT()(Logits(logits), batch)[0]) == pytest.approx(float(NextToken()(Logits(logits), batch)[0]))


def test_samples_read_from_a_file_train_as_those_made_here(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": list(CHAT)}, ensure_ascii=False) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer(TINY_TEXT, 384)
    read = encode_conversations(read_conversations(ChatSource(path=str(path)), tmp_path), tokenizer, 200)
    made = encode_conversations([Conversation(CHAT, "x", "y")], tokenizer, 200)
    assert read.digest == made.digest
