"""`hcx chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hcx.cli.output import echo

if TYPE_CHECKING:
    from hcx.generate import Generator, SamplingParams

HELP = "/reset begins anew, /undo takes the last turn back, Ctrl-C stops an answer, Ctrl-D ends"


def register(app: typer.Typer) -> None:
    """Adds the verb."""

    @app.command("chat")
    def chat(
        model: Annotated[Path, typer.Argument(help="Model directory.", show_default=False)],
        system: Annotated[str | None, typer.Option(help="Instruction that opens the conversation.")] = None,
        max_tokens: Annotated[
            int | None, typer.Option(help="Tokens of one answer at most; 512, or half of a shorter context.")
        ] = None,
        max_seq: Annotated[int | None, typer.Option(help="Tokens of the whole conversation.", min=1)] = None,
        temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
        top_p: Annotated[float, typer.Option(help="Among the most likely that hold this probability.")] = 0.95,
        repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes repeats less likely.")] = 1.0,
        seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
        adapter: Annotated[
            Path | None, typer.Option(help="Adapter directory: PEFT's form, or an AlphaTuning task.")
        ] = None,
        numerics: Annotated[str, typer.Option(help="Kernels: reference, exact or fast.")] = "fast",
        bits: Annotated[int | None, typer.Option(help="Width of a model with nested planes; the widest.")] = None,
        kernel: Annotated[str | None, typer.Option(help="A kernel by name; honoured or refused.")] = None,
        device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    ) -> None:
        """A conversation: answers come word by word, and earlier turns are remembered.

        Commands: /reset begins anew, /undo takes the last turn back; Ctrl-C stops an answer, Ctrl-D ends.
        """
        from hcx.cli.models import load_for_inference
        from hcx.generate import DEFAULT_MAX_SEQ, Generator, SamplingParams

        opening = [] if system is None else [{"role": "system", "content": system}]
        loaded = load_for_inference(model, numerics, kernel, device, adapter, bits)
        generator = Generator(loaded, 1, max_seq or min(loaded.config.max_seq_len, DEFAULT_MAX_SEQ))
        params = SamplingParams(
            max_tokens=max_tokens if max_tokens is not None else min(512, generator.max_seq // 2),
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop_token_ids=generator.end_of_turn_ids,
        )
        # A model without a chat format is refused before the first question.
        generator.encode_chat([*opening, {"role": "user", "content": "?"}])
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            import readline  # noqa: F401  # gives input() line editing and history

            echo(HELP)
        history = list(opening)
        while True:
            try:
                line = input("> " if is_terminal else "")
            except EOFError:
                if is_terminal:
                    echo()
                return
            except KeyboardInterrupt:
                echo()
                continue
            if line.strip() == "/reset":
                history = list(opening)
                echo("(a new conversation)")
            elif line.strip() == "/undo":
                del history[max(len(history) - 2, len(opening)) :]
            elif line.strip().startswith("/"):
                echo(HELP)
            elif line.strip():
                history.append({"role": "user", "content": line})
                ids, history = fit(generator, history, len(opening), params.max_tokens)
                history.append({"role": "assistant", "content": _answer(generator, ids, params)})


def fit(
    generator: Generator, history: list[dict[str, str]], opening: int, max_tokens: int
) -> tuple[list[int], list[dict[str, str]]]:
    """The conversation's ids, without its oldest turns where it has outgrown the context.

    Args:
        generator: the model.
        history: ends with a question.
        opening: messages at the beginning that always stay.
        max_tokens: room to leave for the answer.

    Returns:
        Ids, and the history that they stand for.

    Raises:
        ConfigError: the last question alone is too long.
    """
    from hcx.errors import ConfigError

    kept = list(history)
    ids = generator.encode_chat(kept)
    while len(ids) + max_tokens > generator.max_seq:
        if len(kept) - opening < 3:
            raise ConfigError(
                f"the question and an answer of {max_tokens} tokens need more than the context of {generator.max_seq} "
                "tokens; ask for less with --max-tokens"
            )
        del kept[opening : opening + 2]
        ids = generator.encode_chat(kept)
    if len(kept) < len(history):
        echo(f"(the oldest {(len(history) - len(kept)) // 2} turns no longer fit and are forgotten)")
    return ids, kept


def _answer(generator: Generator, ids: list[int], params: SamplingParams) -> str:
    text = ""
    stream = generator.stream(ids, params)
    try:
        for piece in stream:
            text += piece.text
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stream.close()  # type: ignore[attr-defined]
    sys.stdout.write("\n")
    return text
