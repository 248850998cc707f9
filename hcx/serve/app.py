"""The FastAPI application: OpenAI's protocol in front of one model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from hcx import __version__
from hcx.errors import ConfigError, HcxError
from hcx.generate import DEFAULT_MAX_SEQ, Generator, SamplingParams
from hcx.generate.request import check_prompt
from hcx.model.load import LoadedModel
from hcx.obs import get_logger
from hcx.serve.answers import Call, ChatAnswer, CompletionAnswer
from hcx.serve.config import ServeConfig
from hcx.serve.delivery import EventStream, deliver_whole
from hcx.serve.describe import describe_model
from hcx.serve.errors import ApiError
from hcx.serve.guard import Guard, read_body
from hcx.serve.metrics import ServeMetrics
from hcx.serve.protocol import ChatRequest, Common, CompletionRequest, TokenIds, parse
from hcx.serve.worker import ModelWorker

log = get_logger(__name__)

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions; a chat answer may fill the context."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


class Service:
    """One model behind the endpoints.

    Args:
        loaded: the model; it must have a tokenizer.
        config: address and caps.

    Raises:
        ConfigError: no tokenizer, or a size out of range.
    """

    def __init__(self, loaded: LoadedModel, config: ServeConfig) -> None:
        if loaded.tokenizer is None:
            raise ConfigError(f"{loaded.directory}: no tokenizer.json; a served model needs its tokenizer")
        self.loaded, self.config = loaded, config
        self.tokenizer = loaded.tokenizer
        max_seq = config.max_seq or min(loaded.config.max_seq_len, DEFAULT_MAX_SEQ)
        self.generator = Generator(loaded, config.max_batch, max_seq, config.prefill_tokens)
        if self.generator.detokenizer is None:
            raise AssertionError("a model with a tokenizer has a detokenizer")
        self.detokenizer = self.generator.detokenizer
        self.max_seq = self.generator.max_seq
        self.metrics = ServeMetrics()
        self.worker = ModelWorker(self.generator, config.max_queue, self.metrics)
        self.started = int(time.time())

    @property
    def names(self) -> tuple[str, ...]:
        """Names that calls may give: the model's, then those of its tasks, in the order of their numbers."""
        return (self.config.model_name, *self.loaded.tasks)

    def task(self, name: str | None) -> int:
        """The number of the task that a call names; 0: the model itself, by its name or its directory's.

        Raises:
            ApiError: 404, nothing of that name is served.
        """
        if name in self.loaded.tasks:
            return 1 + self.loaded.tasks.index(name)
        names = {self.config.model_name, self.loaded.directory.resolve().name, self.loaded.directory.name}
        if name is not None and name != self.config.model_name and name.rstrip("/").rpartition("/")[2] not in names:
            raise ApiError(
                404, f"model {name!r} is not served here; valid: {', '.join(self.names)}", "model", "model_not_found"
            )
        return 0

    def params(self, call: Common, prompt: Sequence[int], default: int | None, **values: Any) -> SamplingParams:
        """Sampling parameters of a call for a prompt, checked against the caps."""
        room = self.max_seq - len(prompt)
        limit = self.config.max_prompt_tokens or self.max_seq
        wanted = values.pop("max_tokens")
        if len(prompt) > limit or room < (wanted or 0) or (wanted is None and room < 1):
            answer = "" if wanted is None else f" and {wanted} tokens are asked for"
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens{answer}; prompts may have {limit}, and prompt and answer "
                f"together {self.max_seq}",
                code="context_length_exceeded",
            )
        if len(call.stop) > self.config.max_stop:
            raise ApiError(400, f"stop: {len(call.stop)} strings; at most {self.config.max_stop}", "stop")
        params = SamplingParams(
            max_tokens=wanted if wanted is not None else min(room, default or room),
            temperature=call.temperature,
            top_k=max(call.top_k, 0),
            top_p=call.top_p,
            repetition_penalty=call.repetition_penalty,
            presence_penalty=call.presence_penalty,
            frequency_penalty=call.frequency_penalty,
            seed=call.seed,
            stop=tuple(call.stop),
            stop_token_ids=(*call.stop_token_ids, *values.pop("stop_token_ids", ())),
            ignore_eos=call.ignore_eos,
            **values,
        )
        check_prompt(prompt, params, self.loaded.config.vocab_size, self.max_seq)
        return params

    def logprobs(self, wanted: int | None, param: str) -> int | None:
        """Checks how many alternatives are asked for."""
        if wanted is not None and wanted > self.config.max_logprobs:
            raise ApiError(400, f"{param}: {wanted}; at most {self.config.max_logprobs}", param)
        return wanted

    def submit(self, call: Common, prompts: Sequence[tuple[Sequence[int], SamplingParams]], **known: Any) -> Call:
        """Queues `n` choices for each prompt."""
        requests = []
        task = self.task(call.model)
        for prompt, params in prompts:
            for number in range(call.n):
                seed = None if params.seed is None else params.seed + number
                requests.append(self.generator.request(prompt, replace(params, seed=seed), task))
        job = self.worker.submit(requests)
        count = sum(len(prompt) for prompt, _ in prompts)
        self.metrics.prompt_tokens.inc(count)
        texts = known.pop("prompt_texts")
        return Call(
            job=job,
            model=self.names[task],
            detokenizer=self.detokenizer,
            prompt_texts=None if texts is None else [text for text in texts for _ in range(call.n)],
            prompt_tokens=count,
            include_usage=call.stream_options.include_usage,
            **known,
        )

    def check_choices(self, prompts: int, n: int) -> None:
        """Raises ApiError 400 when one call asks for too many answers."""
        most = min(self.config.max_choices, self.worker.capacity)
        if not prompts:
            raise ApiError(400, "prompt: is an empty list", "prompt")
        if prompts * n > most:
            raise ApiError(400, f"{prompts} prompts with n = {n} make {prompts * n} answers; at most {most}", "n")


async def completion_call(service: Service, request: CompletionRequest) -> Call:
    """Queues a completion."""
    if request.best_of is not None and request.best_of != request.n:
        raise ApiError(400, f"best_of: {request.best_of}; only the value of n ({request.n}) is served", "best_of")
    wanted = service.logprobs(request.logprobs, "logprobs")
    prompts = request.prompts()
    service.check_choices(len(prompts), request.n)

    def encode(prompt: str | TokenIds) -> list[int]:
        if isinstance(prompt, str):
            return service.generator.encode(prompt)
        if not prompt:
            raise ApiError(400, "prompt: a list of token ids is empty", "prompt")
        return prompt

    # On another thread: a long text must not hold up the other connections.
    ids = await asyncio.to_thread(lambda: [encode(prompt) for prompt in prompts])
    ready = []
    for tokens in ids:
        params = service.params(
            request,
            tokens,
            DEFAULT_MAX_TOKENS,
            max_tokens=request.max_tokens,
            logprobs=wanted,
            prompt_logprobs=wanted if request.echo else None,
        )
        ready.append((tokens, params))
    texts = None
    if request.echo:
        texts = [prompt if isinstance(prompt, str) else service.detokenizer.text(prompt) for prompt in prompts]
    return service.submit(request, ready, prompt_texts=texts, wants_logprobs=wanted is not None)


async def chat_call(service: Service, request: ChatRequest) -> Call:
    """Queues a chat answer."""
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs = true", "top_logprobs")
    wanted = service.logprobs(request.top_logprobs if request.logprobs else None, "top_logprobs")
    service.check_choices(1, request.n)
    messages = [message.plain() for message in request.messages]
    ids = await asyncio.to_thread(service.generator.encode_chat, messages)
    most = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    params = service.params(
        request,
        ids,
        None,
        max_tokens=most,
        stop_token_ids=service.generator.end_of_turn_ids,
        logprobs=wanted,
    )
    return service.submit(request, [(ids, params)], prompt_texts=None, wants_logprobs=wanted is not None)


def create_app(loaded: LoadedModel, config: ServeConfig, api_keys: Sequence[str] = ()) -> FastAPI:
    """The application; its worker runs from start-up to shut-down.

    Args:
        loaded: the model.
        config: caps.
        api_keys: any of them opens the server; none: local use without a key.
    """
    service = Service(loaded, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            service.worker.stop()

    app = FastAPI(title="hcx", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, keys=api_keys)
    _add_information(app, service)
    _add_error_handlers(app)

    async def answer(http: Request, endpoint: str) -> Response:
        status = 500
        try:
            body = await read_body(http, config)
            result: CompletionAnswer | ChatAnswer
            if endpoint == "completions":
                request = parse(CompletionRequest, body)
                service.task(request.model)
                result = CompletionAnswer(await completion_call(service, request))
            else:
                chat = parse(ChatRequest, body)
                service.task(chat.model)
                result = ChatAnswer(await chat_call(service, chat))
                request = chat  # type: ignore[assignment]
            close = result.call.job.close
            response: Response
            if request.stream:
                response = EventStream(result.events(), close, config.request_timeout_s)
            else:
                response = await deliver_whole(http, result.whole, close, config.request_timeout_s)
            status = response.status_code
            return response
        except ApiError as error:
            status = error.status
            raise
        except HcxError:
            status = 400
            raise
        finally:
            service.metrics.requests.labels(endpoint, str(status)).inc()

    @app.post("/v1/completions")
    async def completions(http: Request) -> Response:
        return await answer(http, "completions")

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        return await answer(http, "chat/completions")

    return app


def _add_information(app: FastAPI, service: Service) -> None:
    page = files("hcx.serve").joinpath("playground.html").read_text(encoding="utf-8")

    @app.get("/")
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"})

    @app.get("/health")
    async def health() -> JSONResponse:
        running = service.worker.running
        return JSONResponse({"status": "ok" if running else "stopped"}, status_code=200 if running else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(number) for number in range(len(service.names))]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return model(service.task(name))

    def model(number: int) -> dict[str, Any]:
        described = describe_model(service.loaded, service.max_seq)
        return {
            "id": service.names[number],
            "object": "model",
            "created": service.started,
            "owned_by": "hcx",
            **described,
            **({"parent": service.config.model_name} if number else {}),
        }


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HcxError)
    async def not_served(_: Request, error: HcxError) -> JSONResponse:
        # Raised by what the call's values reach: tokenizer, chat template, sampling.
        return ApiError(400, str(error)).response()

    @app.exception_handler(HTTPException)
    async def by_status(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return ApiError(500, "the server failed; see its log").response()
