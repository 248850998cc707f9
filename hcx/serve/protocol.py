"""The requests of OpenAI's protocol, as far as they are served; everything else is refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, ValidationError

from hcx.config import Config
from hcx.serve.errors import ApiError

# Sent by common clients and without effect on the answer.
IGNORED = ("user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key")
MAX_SEED = 2**62
"""Leaves room for the seeds of further answers, which count up from it."""

TokenIds = list[int]


class StreamOptions(Config):
    """How a stream ends."""

    include_usage: bool = False
    """Whether the last event before `[DONE]` counts the tokens."""


class ResponseFormat(Config):
    """Only plain text is served."""

    type: Literal["text"]
    """The kind of answer."""


def _without_empty(stop: list[str] | str) -> list[str]:
    return [text for text in ([stop] if isinstance(stop, str) else stop) if text]


class Common(Config):
    """What both kinds of request share."""

    model_config = ConfigDict(**{**Config.model_config, "allow_inf_nan": False})  # type: ignore[typeddict-item]

    model: str | None = None
    """Name of the served model; may be left out."""
    max_tokens: int | None = Field(default=None, ge=0)
    """New tokens at most."""
    temperature: float = Field(default=1.0, ge=0, le=100)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling."""
    top_k: int = Field(default=0, ge=-1)
    """Among the k most likely (0 or -1: all). Not in OpenAI's protocol."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Not in OpenAI's protocol."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken from logits of tokens that the answer holds."""
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Taken from those logits once per occurrence."""
    n: int = Field(default=1, ge=1)
    """Answers per prompt."""
    seed: int | None = Field(default=None, ge=-MAX_SEED, le=MAX_SEED)
    """Makes sampling repeatable."""
    stop: Annotated[list[str] | str, AfterValidator(_without_empty)] = Field(default_factory=list)
    """Strings that end the answer."""
    stop_token_ids: list[int] = Field(default_factory=list)
    """Tokens that end the answer. Not in OpenAI's protocol."""
    ignore_eos: bool = False
    """The model's end token does not end the answer. Not in OpenAI's protocol."""
    stream: bool = False
    """Whether the answer comes as events."""
    stream_options: StreamOptions = StreamOptions()
    """How a stream ends."""


class CompletionRequest(Common):
    """`POST /v1/completions`."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    """Text, token ids, or a list of either."""
    echo: bool = False
    """Whether the answer begins with the prompt."""
    logprobs: int | None = Field(default=None, ge=0)
    """Log-probabilities of each token with this many alternatives."""
    best_of: int | None = None
    """Only the value of `n`."""

    def prompts(self) -> list[str | TokenIds]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class TextPart(Config):
    """Part of a message's content; only text is served."""

    type: Literal["text"]
    """The kind of part."""
    text: str
    """Its text."""


class Message(Config):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks; `developer` is taken as `system`."""
    content: str | list[TextPart]
    """What is said."""
    name: str | None = None
    """Ignored."""

    def plain(self) -> dict[str, str]:
        """Role and text."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(Common):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    """The conversation so far."""
    max_completion_tokens: int | None = Field(default=None, ge=0)
    """The newer name of `max_tokens`."""
    logprobs: bool = False
    """Whether log-probabilities are wanted."""
    top_logprobs: int = Field(default=0, ge=0)
    """Alternatives per token."""
    response_format: ResponseFormat = ResponseFormat(type="text")
    """Only plain text."""


Request = TypeVar("Request", bound=Common)


def parse(kind: type[Request], body: bytes) -> Request:
    """A request out of a body.

    Raises:
        ApiError: 400, with the field that is wrong.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    # A null means the default in OpenAI's protocol.
    values = {name: value for name, value in values.items() if value is not None and name not in IGNORED}
    if values.get("logit_bias") == {}:
        del values["logit_bias"]
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first(error, values) from None


def _first(error: ValidationError, values: dict[str, Any]) -> ApiError:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = next((entry for entry in found if entry["type"] == "extra_forbidden"), found[0])
    path = ".".join(str(part) for part in first["loc"])
    field = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{path}: this server does not support it", field, "unsupported_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{path}: is required", field, "missing_parameter")
    if field == "prompt":
        return ApiError(400, "prompt: must be text, token ids, a list of texts or a list of lists of token ids", field)
    return ApiError(400, f"{path}: {first['msg']}", field, "invalid_value")
