"""Chat messages to token ids, so that no user text can forge a role token."""

from __future__ import annotations

import ctypes
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from hcx.errors import DataError
from hcx.tokenizer.special import ASSISTANT, END_OF_TURN, USER

if TYPE_CHECKING:
    from hcx.tokenizer.codec import Tokenizer

TIME_LIMIT_S = 5.0
"""A template from a foreign directory is a program; it may not hold a server up."""

Message = Mapping[str, Any]


class _TimeLimit(Exception):
    pass


def check_messages(messages: Sequence[Message]) -> None:
    """Raises DataError unless every message has a `role` and a `content` of text."""
    for number, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DataError(f"messages[{number}].{key} = {message.get(key)!r}: must be text")


def render_own(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
    """The ids that `CHAT_TEMPLATE` describes; contents are encoded as ordinary text."""
    return [token for ids, _ in _own_pieces(tokenizer, messages, add_generation_prompt) for token in ids]


def trained_own(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """(ids, which of them an assistant has to produce): its text and the token that closes its turn, not the header."""
    ids: list[int] = []
    trained: list[bool] = []
    for piece, is_answer in _own_pieces(tokenizer, messages, False):
        ids += piece
        trained += [is_answer] * len(piece)
    return ids, trained


def _own_pieces(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool
) -> Iterator[tuple[list[int], bool]]:
    special, encode = tokenizer.special_tokens, tokenizer.encode
    plain = ""
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "system":
            # Encoded together with what may follow, as every reader of the template does.
            plain += content + "\n\n"
            continue
        if role not in ("user", "assistant"):
            raise DataError(f"messages[{number}].role = {role!r}: valid: system, user, assistant")
        yield encode(plain), False
        plain = ""
        if role == "user":
            yield [special[USER], *encode(content), special[END_OF_TURN]], False
        else:
            yield [special[ASSISTANT]], False
            yield [*encode(content), special[END_OF_TURN]], True
    yield encode(plain), False
    if add_generation_prompt:
        yield [special[ASSISTANT]], False


def trained_foreign(
    render: Callable[[Sequence[Message], bool], list[int]], messages: Sequence[Message], special_ids: Set[int]
) -> tuple[list[int], list[bool]]:
    """`trained_own` for any template: an answer is what stands after the prompt that the model would be given.

    Args:
        render: (messages, whether to end with the prompt for an answer) -> ids.
        messages: the conversation.
        special_ids: what follows an answer's last special token (a line break, in many templates) is not trained.

    Raises:
        DataError: the template changes earlier turns when later ones are added, so that no such prompt exists.
    """
    ids: list[int] = []
    trained: list[bool] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, whole = render(messages[:number], True), render(messages[: number + 1], False)
        if prompt[: len(ids)] != ids or whole[: len(prompt)] != prompt:
            raise DataError(
                f"messages[{number}]: this chat template writes a conversation differently once it is answered, so "
                "that the answer cannot be told from its prompt; train with a template that only ever appends"
            )
        answer = whole[len(prompt) :]
        closing = max((place for place, token in enumerate(answer) if token in special_ids), default=len(answer) - 1)
        trained += [False] * (len(prompt) - len(ids))
        trained += [place <= closing for place in range(len(answer))]
        ids = whole
    return ids, trained


def render_foreign(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> list[int]:
    """Renders a Jinja template in a sandbox and encodes the result; special strings count only where the template
    wrote them.

    Contents without special strings are rendered as they are. Otherwise each such content is replaced by a random
    mark, and encoded as ordinary text where the mark came out.
    """
    special = [token for token in tokenizer.special_tokens if token]
    suspicious = re.compile("|".join(map(re.escape, special))) if special else None
    marks: dict[str, str] = {}
    safe = []
    for message in messages:
        plain = dict(message)
        if suspicious is not None and suspicious.search(plain["content"]):
            mark = f"X{secrets.token_hex(16)}X"
            marks[mark] = plain["content"]
            plain["content"] = mark
        safe.append(plain)
    text = _limited(lambda: _render(template, safe, add_generation_prompt, variables))
    if not marks:
        return tokenizer.encode(text, allow_special=True)
    ids: list[int] = []
    for part in re.split("(" + "|".join(marks) + ")", text):
        ids += tokenizer.encode(marks[part]) if part in marks else tokenizer.encode(part, allow_special=True)
    return ids


def _render(template: str, messages: list[dict[str, Any]], prompt: bool, variables: Mapping[str, Any]) -> str:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    # As transformers: templates print JSON without HTML escapes.
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=prompt, **dict(variables)
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise DataError(f"the chat template refused the messages: {error}") from None


def _limited(work: Callable[[], str]) -> str:
    """Runs pure-Python work in a thread that an exception stops when its time is over."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIME_LIMIT_S)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TimeLimit))
        raise DataError(f"the chat template took longer than {TIME_LIMIT_S} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
