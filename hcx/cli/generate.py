"""`hcx generate`: continues a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hcx.cli.output import print_json


def register(app: typer.Typer) -> None:
    """Adds the verb."""

    @app.command("generate")
    def generate(
        model: Annotated[Path, typer.Argument(help="Model directory.", show_default=False)],
        prompt: Annotated[str | None, typer.Option(help="Text to continue; standard input if not given.")] = None,
        max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 128,
        temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
        top_k: Annotated[int, typer.Option(help="Among the k most likely; 0: all.")] = 0,
        top_p: Annotated[float, typer.Option(help="Among the most likely that hold this probability.")] = 1.0,
        repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes repeats less likely.")] = 1.0,
        seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
        stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.")] = None,
        ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end of text.")] = False,
        adapter: Annotated[
            Path | None, typer.Option(help="Adapter directory: PEFT's form, or an AlphaTuning task.")
        ] = None,
        numerics: Annotated[str, typer.Option(help="Kernels: reference, exact or fast.")] = "reference",
        bits: Annotated[int | None, typer.Option(help="Width of a model with nested planes; the widest.")] = None,
        kernel: Annotated[str | None, typer.Option(help="A kernel by name; honoured or refused.")] = None,
        device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
        as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
    ) -> None:
        """Continues a text with any model directory.

        The continuation goes to standard output as it comes. With --json one object at the end: text, token ids and
        why it stopped.
        """
        from hcx.cli.models import load_for_inference
        from hcx.generate import Generator, SamplingParams, check_prompt, encode_prompt

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=tuple(stop or ()),
            ignore_eos=ignore_eos,
        )
        text = _standard_input() if prompt is None else prompt
        loaded = load_for_inference(model, numerics, kernel, device, adapter, bits)
        ids = encode_prompt(loaded, text)
        check_prompt(ids, params, loaded.config.vocab_size, loaded.config.max_seq_len)
        # No larger than needed: a long-context model's whole cache could exceed the memory.
        generator = Generator(loaded, max_batch=1, max_seq=len(ids) + max_tokens)
        if as_json:
            (answer,) = generator.generate([ids], params)
            print_json(
                {
                    "prompt": text,
                    "prompt_tokens": len(ids),
                    "text": answer.text,
                    "token_ids": list(answer.token_ids),
                    "finish_reason": answer.finish_reason,
                }
            )
            return
        for piece in generator.stream(ids, params):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        sys.stdout.write("\n")


def _standard_input() -> str:
    from hcx.errors import DataError

    if sys.stdin.isatty():
        sys.stderr.write("reading the prompt from the terminal; end it with Ctrl-D\n")
    try:
        # The newline that `echo` adds is not part of the text.
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None
