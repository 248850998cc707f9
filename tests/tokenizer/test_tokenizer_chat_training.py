"""What of a conversation is trained, and the preamble that the chat template carries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hcx.errors import DataError
from hcx.testing.tiny import TINY_TEXT
from hcx.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, Tokenizer, train_tokenizer
from hcx.tokenizer.special import chat_template, preamble_of

TOKENIZER = train_tokenizer(TINY_TEXT, 512)
USER, ASSISTANT, END = (TOKENIZER.special_tokens[t] for t in ("<|user|>", "<|assistant|>", "<|endofturn|>"))
CHAT = [
    {"role": "system", "content": "짧게 답하라."},
    {"role": "user", "content": "수도는?"},
    {"role": "assistant", "content": "서울이다."},
    {"role": "user", "content": "Open it."},
    {"role": "assistant", "content": "Choose Open."},
]
MARKED_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{- '<|assistant|>' ~ message['content'] ~ '<|endofturn|>' -}}",
    "{{- '<|assistant|>' -}}{% generation %}{{- message['content'] ~ '<|endofturn|>' -}}{% endgeneration %}",
)
"""Our template with transformers' marks around what an assistant generates."""
CHATML = (
    "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}<|endofturn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)
"""The shape of many published templates: one token opens every turn, and a line break closes it."""

contents = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.sampled_from([*SPECIAL_TOKENS, *TINY_TEXT])
    ),
    max_size=4,
).map("".join)
conversations = st.lists(
    st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), contents),
    min_size=1,
    max_size=5,
)


def with_template(directory: Path, template: str) -> Tokenizer:
    TOKENIZER.save(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return Tokenizer.load(directory)


def test_answers_and_the_tokens_that_close_them_are_trained_and_nothing_else() -> None:
    ids, trained = TOKENIZER.render_training(CHAT)
    expected: list[tuple[int, bool]] = []
    for text, token in (("짧게 답하라.\n\n", None), ("수도는?", USER), ("서울이다.", ASSISTANT)):
        answer = token == ASSISTANT
        expected += [] if token is None else [(token, False)]
        expected += [(i, answer) for i in TOKENIZER.encode(text)]
        expected += [] if token is None else [(END, answer)]
    assert list(zip(ids, trained, strict=True))[: len(expected)] == expected
    assert [i for i, is_trained in zip(ids, trained, strict=True) if is_trained] == [
        token for text in ("서울이다.", "Choose Open.") for token in (*TOKENIZER.encode(text), END)
    ]


def test_the_mask_is_that_of_transformers_marks(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert MARKED_TEMPLATE != CHAT_TEMPLATE
    found = theirs.apply_chat_template(
        CHAT, chat_template=MARKED_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = TOKENIZER.render_training(CHAT)
    assert found["input_ids"] == ids
    assert found["assistant_masks"] == [int(flag) for flag in trained]


@settings(max_examples=100, deadline=None)
@given(conversations)
def test_training_and_serving_render_the_same_ids_and_no_content_forges_a_role(messages: list[dict[str, str]]) -> None:
    ids, trained = TOKENIZER.render_training(messages)
    assert ids == TOKENIZER.render_chat(messages, add_generation_prompt=False)
    special = [i for i in ids if i in TOKENIZER.special_tokens.values()]
    opening = {"user": USER, "assistant": ASSISTANT}
    assert special == [token for message in messages for token in (opening[message["role"]], END)]
    assert TOKENIZER.decode(ids) == "".join(message["content"] for message in messages)
    answers = "".join(message["content"] for message in messages if message["role"] == "assistant")
    assert TOKENIZER.decode([i for i, flag in zip(ids, trained, strict=True) if flag]) == answers


def test_a_foreign_template_is_trained_from_where_the_prompt_ends_to_the_closing_token(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHATML)
    messages = CHAT[1:]
    ids, trained = tokenizer.render_training(messages)
    assert ids == tokenizer.render_chat(messages, add_generation_prompt=False)
    text = tokenizer.decode([i for i, flag in zip(ids, trained, strict=True) if flag], skip_special=False)
    assert text == "서울이다.<|endofturn|>Choose Open.<|endofturn|>"
    for number in (1, 3):
        prompt = tokenizer.render_chat(messages[:number], add_generation_prompt=True)
        assert ids[: len(prompt)] == prompt
        assert trained[len(prompt)]
        assert not trained[len(prompt) - 1]


def test_a_template_that_rewrites_earlier_turns_cannot_be_trained(tmp_path: Path) -> None:
    last_only = "{% for m in messages[-2:] %}<|user|>{{ m['content'] }}<|endofturn|>{% endfor %}"
    with pytest.raises(DataError, match=r"messages\[3\]: this chat template writes a conversation differently"):
        with_template(tmp_path, last_only).render_training(CHAT[1:4] + CHAT[2:3])


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_a_preamble_is_read_back_from_the_template(preamble: str) -> None:
    assert preamble_of(chat_template(preamble)) == preamble


def test_templates_that_are_not_ours_have_no_preamble() -> None:
    assert preamble_of(CHAT_TEMPLATE) == ""
    for foreign in (CHATML, "{{ x }}" + CHAT_TEMPLATE, CHAT_TEMPLATE + " "):
        assert preamble_of(foreign) is None


@pytest.mark.parametrize("preamble", ["다음은 대화입니다.", 'a "quoted" \\ {{ x }} -}} {% if %}\n<|user|> 한\u200d'])
def test_a_preamble_opens_conversations_without_a_system_text_here_and_in_transformers(
    tmp_path: Path, preamble: str
) -> None:
    tokenizer = TOKENIZER.with_preamble(preamble)
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    bare = CHAT[1:]
    ids = again.render_chat(bare)
    assert ids == [*TOKENIZER.encode(preamble + "\n\n"), *TOKENIZER.render_chat(bare)]
    assert ids[:-1] == again.render_training(bare)[0]
    assert again.render_chat(CHAT) == TOKENIZER.render_chat(CHAT)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if "<|" in preamble:
        return  # other readers take special strings in a preamble for what they say: it is the model maker's text
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    for chat in (bare, CHAT):
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert again.render_chat(chat) == expected


def test_a_foreign_format_takes_no_preamble(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="role system"):
        with_template(tmp_path, CHATML).with_preamble("x")
