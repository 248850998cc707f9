"""`hcx serve`: OpenAI's protocol over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import echo


def register(app: typer.Typer) -> None:
    """Adds the verb."""

    @app.command("serve")
    def serve(
        model: Annotated[Path, typer.Argument(help="Model directory.", show_default=False)],
        host: Annotated[str, typer.Option(help="Address; others than this machine's own need --api-key-file.")] = (
            "127.0.0.1"
        ),
        port: Annotated[int, typer.Option(help="TCP port; 0: any free one.", min=0, max=65535)] = 8000,
        api_key_file: Annotated[Path | None, typer.Option(help="File with API keys, one per line.")] = None,
        name: Annotated[str | None, typer.Option(help="Name of the model; its directory's if not given.")] = None,
        adapter: Annotated[
            list[str] | None,
            typer.Option(help="NAME=DIR: an adapter served as NAME. Several AlphaTuning tasks may be given."),
        ] = None,
        numerics: Annotated[str, typer.Option(help="Kernels: reference, exact or fast.")] = "fast",
        bits: Annotated[int | None, typer.Option(help="Width of a model with nested planes; the widest.")] = None,
        kernel: Annotated[str | None, typer.Option(help="A kernel by name; honoured or refused.")] = None,
        device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
        max_batch: Annotated[int, typer.Option(help="Requests that generate at the same time.", min=1)] = 8,
        max_seq: Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.", min=1)] = None,
        max_queue: Annotated[int, typer.Option(help="Choices that may wait.", min=0)] = 256,
        max_prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt.", min=1)] = None,
        max_choices: Annotated[int, typer.Option(help="Prompts times n in one request.", min=1)] = 128,
        max_logprobs: Annotated[int, typer.Option(help="Alternatives per token.", min=0)] = 20,
        max_body_bytes: Annotated[int, typer.Option(help="Size of a request's body.", min=1)] = 4 * 2**20,
        request_timeout_s: Annotated[float, typer.Option(help="Seconds per request.", min=0.001)] = 300.0,
    ) -> None:
        """Serves a model with OpenAI's protocol: /v1/completions, /v1/chat/completions, /v1/models.

        Also /health, /metrics (Prometheus) and a playground page at /. Ctrl-C ends it.
        """
        from hcx.errors import ConfigError
        from hcx.serve.config import ServeConfig, read_api_keys

        served, updates, tasks = _adapters(adapter or [])
        if served is not None and name is not None:
            raise ConfigError(f"--name {name}: with --adapter the name is the adapter's, {served}")
        config = ServeConfig(
            host=host,
            port=port,
            model_name=served or name or model.resolve().name,
            max_batch=max_batch,
            max_seq=max_seq,
            max_queue=max_queue,
            max_prompt_tokens=max_prompt_tokens,
            max_choices=max_choices,
            max_logprobs=max_logprobs,
            max_body_bytes=max_body_bytes,
            request_timeout_s=request_timeout_s,
        )
        if config.model_name in tasks:
            raise ConfigError(f"--adapter {config.model_name}=...: that is the model's own name; choose another")
        keys = read_api_keys(api_key_file, host)

        from hcx.cli.models import load_for_inference
        from hcx.serve.server import bind, make_server

        listener = bind(host, port)
        try:
            loaded = load_for_inference(model, numerics, kernel, device, updates, bits, tasks)
            server = make_server(loaded, config, keys)
            shown = f"[{host}]" if ":" in host else host
            echo(f"serving {config.model_name} at http://{shown}:{listener.getsockname()[1]} (Ctrl-C ends)")
            sys.stdout.flush()
            server.run(sockets=[listener])
        finally:
            listener.close()


def _adapters(given: list[str]) -> tuple[str | None, Path | None, dict[str, Path]]:
    """(name, directory) of one low-rank adapter, or the directories of tasks by name; nothing of the other."""
    from hcx.errors import ConfigError
    from hcx.model.tasks import is_task

    named: dict[str, Path] = {}
    for text in given:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise ConfigError(f"--adapter {text}: write NAME=DIR, for example --adapter support=runs/sft/adapter")
        if name in named:
            raise ConfigError(f"--adapter {text}: the name {name} is given twice")
        named[name] = Path(directory)
    low_rank = [name for name, directory in named.items() if not is_task(directory)]
    if not low_rank:
        return None, None, named
    if len(named) > 1:
        raise ConfigError(
            f"--adapter {given[1]}: one adapter per server, unless all are AlphaTuning tasks; start another for the "
            "next"
        )
    return low_rank[0], named[low_rank[0]], {}
