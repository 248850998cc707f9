"""Answers in OpenAI's form: whole, or as events."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hcx.generate import Detokenizer, Piece, TokenLogprob
from hcx.serve.worker import Job

LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity."""
DONE = "data: [DONE]\n\n"


def event(value: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'), allow_nan=False)}\n\n"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else LOWEST_LOGPROB


class CompletionLogprobs:
    """The `logprobs` object of a completion, also in parts; offsets count characters of the answer's text."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._text = detokenizer.stream()

    def part(self, entries: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """The object for the next tokens."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        name = self._detokenizer.token_text
        for entry in entries:
            found["tokens"].append(name(entry.token))
            found["text_offset"].append(len(self._text.text))
            self._text.push(entry.token)
            if entry.logprob is None:
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                continue
            found["token_logprobs"].append(_finite(entry.logprob))
            top: dict[str, float] = {}
            # Two tokens may have one name; the likelier, which comes first, keeps it.
            for token, logprob in (*entry.top, (entry.token, entry.logprob)):
                top.setdefault(name(token), _finite(logprob))
            found["top_logprobs"].append(top)
        return found


def chat_logprobs(detokenizer: Detokenizer, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` object of a chat answer."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        raw = detokenizer.token_bytes(token)
        return {"token": detokenizer.token_text(token), "logprob": _finite(logprob), "bytes": list(raw)}

    return {
        "content": [
            {**one(entry.token, entry.logprob or 0.0), "top_logprobs": [one(*top) for top in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


@dataclass
class Call:
    """What answering needs to know of a call.

    Attributes:
        job: its requests on the worker.
        model: name of the model.
        detokenizer: for the names of tokens.
        prompt_texts: text of each choice's prompt, if it is echoed.
        prompt_tokens: of all prompts, each counted once.
        wants_logprobs: whether the answers carry log-probabilities.
        include_usage: whether a stream ends with the usage.
    """

    job: Job
    model: str
    detokenizer: Detokenizer
    prompt_texts: Sequence[str] | None
    prompt_tokens: int
    wants_logprobs: bool
    include_usage: bool
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: secrets.token_hex(12))

    def head(self, kind: str, prefix: str) -> dict[str, Any]:
        """The fields that every answer begins with."""
        return {"id": f"{prefix}-{self.key}", "object": kind, "created": self.created, "model": self.model}

    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        written = sum(len(request.tokens) for request in self.job.requests)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }


class CompletionAnswer:
    """`text_completion` objects."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._logprobs = [CompletionLogprobs(call.detokenizer) for _ in call.job.requests]

    def _choice(self, index: int, text: str, entries: Sequence[TokenLogprob], reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs[index].part(entries) if self.call.wants_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _prompt(self, index: int) -> tuple[str, list[TokenLogprob]]:
        if self.call.prompt_texts is None:
            return "", []
        return self.call.prompt_texts[index], self.call.job.requests[index].prompt_logprobs

    async def whole(self) -> dict[str, Any]:
        """The answer once everything has finished."""
        async for _ in self.call.job.pieces():
            pass
        choices = []
        for index, request in enumerate(self.call.job.requests):
            text, entries = self._prompt(index)
            text += request.stream.text if request.stream is not None else ""
            choices.append(self._choice(index, text, [*entries, *request.logprobs], request.finish_reason))
        return {**self.call.head("text_completion", "cmpl"), "choices": choices, "usage": self.call.usage()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        head = self.call.head("text_completion", "cmpl")
        begun: set[int] = set()
        async for index, piece in self.call.job.pieces():
            text, entries = piece.text, list(piece.logprobs)
            if index not in begun:
                begun.add(index)
                prompt, scored = self._prompt(index)
                text, entries = prompt + text, scored + entries
            if text or entries or piece.finish_reason:
                yield event({**head, "choices": [self._choice(index, text, entries, piece.finish_reason)]})
        if self.call.include_usage:
            yield event({**head, "choices": [], "usage": self.call.usage()})
        yield DONE


class ChatAnswer:
    """`chat.completion` objects."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return chat_logprobs(self.call.detokenizer, entries) if self.call.wants_logprobs else None

    async def whole(self) -> dict[str, Any]:
        """The answer once everything has finished."""
        async for _ in self.call.job.pieces():
            pass
        choices = []
        for index, request in enumerate(self.call.job.requests):
            text = request.stream.text if request.stream is not None else ""
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": self._logprobs(request.logprobs),
                    "finish_reason": request.finish_reason,
                }
            )
        return {**self.call.head("chat.completion", "chatcmpl"), "choices": choices, "usage": self.call.usage()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        head = self.call.head("chat.completion.chunk", "chatcmpl")

        def chunk(index: int, delta: dict[str, Any], piece: Piece | None = None) -> str:
            choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            if piece is not None:
                choice["logprobs"] = self._logprobs(piece.logprobs)
                choice["finish_reason"] = piece.finish_reason
            return event({**head, "choices": [choice]})

        for index in range(len(self.call.job.requests)):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for index, piece in self.call.job.pieces():
            if piece.text or piece.logprobs or piece.finish_reason:
                yield chunk(index, {"content": piece.text} if piece.text else {}, piece)
        if self.call.include_usage:
            yield event({**head, "choices": [], "usage": self.call.usage()})
        yield DONE
