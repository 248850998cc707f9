"""Conversations out of files, and as samples: forms, counts, truncation at turns, held-out shares."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

from hcx.data.chat_rows import ChatSource, Conversation, read_conversations
from hcx.data.chat_samples import encode_conversations, split_held_out
from hcx.errors import DataError
from hcx.testing.tiny import TINY_TEXT
from hcx.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(TINY_TEXT, 512)
USER, ASSISTANT, END = (TOKENIZER.special_tokens[t] for t in ("<|user|>", "<|assistant|>", "<|endofturn|>"))
ASKED = ({"role": "user", "content": "수도는?"}, {"role": "assistant", "content": "서울이다."})


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, **settings: Any) -> list[Conversation]:
    return list(read_conversations(ChatSource(path=path.name, **settings), path.parent))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "수도는?"}, {"role": "assistant", "content": "서울이다."}]},
        {"conversations": [{"from": "human", "value": "수도는?"}, {"from": "gpt", "value": "서울이다."}]},
        {"prompt": "수도는?", "response": "서울이다."},
        {"prompt": "수도는?", "completion": "서울이다."},
        {"instruction": "수도는?", "input": "", "output": "서울이다."},
        {"instruction": "수도는?", "instances": [{"input": "", "output": "서울이다."}]},
    ],
    ids=lambda row: "-".join(row),
)
def test_every_published_form_reads_as_the_same_messages(tmp_path: Path, row: dict[str, Any]) -> None:
    (conversation,) = read(write(tmp_path / "a.jsonl", row))
    assert conversation.messages == ASKED
    assert (conversation.source, conversation.place.endswith("line 1")) == ("a", True)


def test_an_input_follows_its_instruction_and_a_system_text_comes_first(tmp_path: Path) -> None:
    row = {"instruction": "요약하라.", "input": "긴 글", "output": "짧은 글", "system": "너는 편집자다."}
    (conversation,) = read(write(tmp_path / "a.jsonl", row))
    assert [message["content"] for message in conversation.messages] == [
        "너는 편집자다.",
        "요약하라.\n\n긴 글",
        "짧은 글",
    ]


def test_columns_of_tables_and_compressed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('Q,A,label\n수도는?,서울이다.,0\n"쉼표, 그리고\n줄",좋아.,1\n', encoding="utf-8")
    found = read(tmp_path / "a.csv", question="Q", answer="A")
    assert found[0].messages == ASKED
    assert found[1].messages[0]["content"] == "쉼표, 그리고\n줄"
    with gzip.open(tmp_path / "b.tsv.gz", "wt", encoding="utf-8") as file:
        file.write("q\ta\n수도는?\t서울이다.\n")
    assert read(tmp_path / "b.tsv.gz", question="q", answer="a")[0].messages == ASKED
    with lzma.open(tmp_path / "c.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"q": "수도는?", "a": "서울이다."}) + "\n")
    (conversation,) = read(tmp_path / "c.jsonl.xz", question="q", answer="a", name="pairs")
    assert (conversation.messages, conversation.source) == (ASKED, "pairs")
    (conversation,) = read(tmp_path / "c.jsonl.xz", question="q", answer="a", instruction="답하라.")
    assert conversation.messages[0]["content"] == "답하라.\n\n수도는?"


def test_a_limit_counts_conversations(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{"prompt": str(n), "response": "x"} for n in range(5)])
    assert [c.messages[0]["content"] for c in read(path, limit=2)] == ["0", "1"]


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ('{"text": "x"}\n', {}, r"line 1: no known form of conversation.*the row has: text"),
        ('{"prompt": "x", "response": 3}\n', {}, r"line 1\[1\]: the content must be text, is int"),
        ('{"prompt": "x"}\n', {}, "the content must be text, is NoneType"),
        (
            '\n{"messages": [{"role": "tool", "content": "x"}]}\n',
            {},
            r"line 2: messages\[0\]: role 'tool' is not known",
        ),
        ('{"messages": "x"}\n', {}, "must be a list of messages, is str"),
        ('{"a": "x"}\n', {"question": "q", "answer": "a"}, "no text under 'q'; the row has: a"),
        ('{"a": "x"}\n{"a"', {"question": "a", "answer": "a"}, "line 2: not JSON"),
        ("[]\n", {}, "line 1: a row must be a JSON object"),
        ("{}\n", {"question": "q"}, "give both or neither"),
    ],
)
def test_rows_that_cannot_be_read_are_named_by_file_and_line(
    tmp_path: Path, content: str, settings: dict[str, str], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl", **settings)


def test_missing_files_and_other_kinds_of_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file matches the pattern"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"read from \.jsonl, \.csv and \.tsv"):
        read(tmp_path / "a.parquet")


def turns(*texts: str, place: str = "here") -> Conversation:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[n % 2], "content": text} for n, text in enumerate(texts))
    return Conversation(messages, "test", place)


def test_a_row_holds_inputs_and_the_ids_that_follow_and_weighs_answers_only() -> None:
    samples = encode_conversations([turns("수도는?", "서울이다."), turns("a", "b")], TOKENIZER, 64)
    batch = samples.micro_batch([1, 0], rows=3, seq_len=16)
    assert batch.tokens.shape == batch.labels.shape == batch.weights.shape == batch.positions.shape == (3, 16)
    assert (batch.sample_ids, batch.sources) == ((1, 0), ("test", "test"))
    for row, (question, answer) in enumerate((("a", "b"), ("수도는?", "서울이다."))):
        asked, said = TOKENIZER.encode(question), TOKENIZER.encode(answer)
        ids = [USER, *asked, END, ASSISTANT, *said, END]
        assert batch.tokens[row, : len(ids) - 1].tolist() == ids[:-1]
        assert batch.labels[row, : len(ids) - 1].tolist() == ids[1:]
        first = len(asked) + 2
        assert torch.nonzero(batch.weights[row])[:, 0].tolist() == list(range(first, first + len(said) + 1))
    assert float(batch.weights.sum()) == samples.num_trained
    assert float(batch.weights[2].sum()) == 0
    assert batch.positions[2].tolist() == list(range(16))


def test_long_conversations_lose_whole_turns_from_the_end_or_are_left_out() -> None:
    texts = ("하나", "둘", "셋", "넷", "다섯", "여섯")
    whole, _ = TOKENIZER.render_training(turns(*texts).messages)
    shorter, mask = TOKENIZER.render_training(turns(*texts[:4]).messages)
    limit = len(whole) - 2  # one input too few for the whole
    given = [turns(*texts), turns("ㄱ", "가" * 200), turns("a", "b")]
    cut = encode_conversations(given, TOKENIZER, limit, "truncate")
    assert cut.counts == {"read": 3, "kept": 2, "truncated": 1, "too long": 1, "no answer": 0}
    assert cut.ids[: cut.starts[1]].tolist() == shorter
    assert cut.trained[: cut.starts[1]].tolist() == mask
    dropped = encode_conversations(given, TOKENIZER, limit, "drop")
    assert dropped.counts == {"read": 3, "kept": 1, "truncated": 0, "too long": 2, "no answer": 0}
    exact = encode_conversations(given[:1], TOKENIZER, len(whole) - 1, "drop")
    assert exact.ids.tolist() == whole


def test_turns_behind_the_last_answer_teach_nothing_and_go() -> None:
    samples = encode_conversations([turns("a", "b", "c"), turns("a", ""), turns("a")], TOKENIZER, 64)
    assert samples.ids.tolist() == TOKENIZER.render_training(turns("a", "b").messages)[0]
    assert samples.counts["no answer"] == 2


def test_nothing_left_is_an_error_that_counts_the_reasons() -> None:
    with pytest.raises(DataError, match=r"no conversation is left of 2: 1 have no answer, 1 no first answer within 4"):
        encode_conversations([turns("a"), turns("a", "가" * 50)], TOKENIZER, 4)


def test_every_token_can_be_trained_but_the_first() -> None:
    samples = encode_conversations([turns("a", "b")], TOKENIZER, 64, every_token=True)
    assert samples.trained.tolist() == [False] + [True] * (len(samples.ids) - 1)


def test_held_out_conversations_are_chosen_by_content_and_by_their_own_split() -> None:
    given = [turns(f"질문 {n}", "답") for n in range(400)]
    _, held_out = split_held_out(given, 0.1)
    assert 20 <= len(held_out) <= 65  # binomial(400, 0.1), five deviations
    again, held_again = split_held_out([*reversed(given), *given[:50]], 0.1)
    assert {str(c.messages) for c in held_again} == {str(c.messages) for c in held_out}
    assert not {str(c.messages) for c in again} & {str(c.messages) for c in held_out}
    stated = [Conversation(c.messages, c.source, c.place, "train") for c in held_out]
    assert split_held_out(stated, 0.1) == (stated, [])
