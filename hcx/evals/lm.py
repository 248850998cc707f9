"""The lm-eval adapter: our decoder under lm-eval's tasks, equal per request to its `hf` backend.

Tokenisation, the split into context and continuation, truncation and the treatment of BOS follow
`lm_eval.models.huggingface.HFLM` (0.4.13) step by step; what differs is only how the work is done: rows with equal
inputs are computed once, and logits are made in chunks of the scored positions only, so that `[batch, seq, vocab]` is
never materialised, and contexts that requests share are computed once (`hcx.evals.prefix`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import configure_pad_token, has_bos_prefix, normalize_gen_kwargs
from torch import Tensor

from hcx.dist.seeding import derived_seed
from hcx.errors import EvalError
from hcx.generate import Generator, SamplingParams
from hcx.model.convert.tokenizer import transformers_tokenizer
from hcx.model.meta import ForwardMeta
from hcx.obs import Progress

if TYPE_CHECKING:
    from hcx.model.load import LoadedModel

LOGIT_CHUNK = 512
"""Positions whose logits exist at the same time: at a vocabulary of 131,072 that is 256 MiB of fp32."""

SAMPLING_SEED = 1234
"""lm-eval's own default for torch, on which its `hf` model's samples depend."""

PADDING = ("right", "left")
"""Sides on which rows can be filled up."""

GENERATION_ROUND = 8
"""Batches handed to the generator at a time: enough to keep its rows full, few enough to show progress."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
Answer = tuple[float, bool]


@register_model("hcx")
class HcxLM(TemplateLM):
    """A model directory of any kind that `hcx` reads, for lm-eval.

    Args:
        pretrained: a model directory (full precision or BCQ), or a loaded model.
        batch_size: rows per forward pass.
        max_length: longest input in tokens; the model's own if not given.
        dtype: such as `float32` or `bfloat16`; as stored if not given.
        device: where the model runs.
        numerics: class of the quantized products (`reference`, `exact`, `fast`).
        add_bos_token: force or forbid BOS; what the tokenizer says if not given.
        adapter: a directory of low-rank updates (PEFT's files); with a directory as `pretrained`.
        deterministic: one row at a time, so that results are the same bits at any batch size; slower.
        prefix_reuse: compute contexts that requests share once; off in deterministic mode.
        padding: side on which shorter rows of a batch are filled up, `right` or `left`; answers do not depend on it.
        seed: of sampled continuations; each request draws its own from it and from its place.

    Raises:
        CheckpointError: the directory is not a model, or has no tokenizer.
        EvalError: an argument has a value that it cannot have.
    """

    def __init__(
        self,
        pretrained: str | Path | LoadedModel,
        batch_size: int | str = 1,
        max_length: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: str = "cpu",
        numerics: str = "reference",
        add_bos_token: bool | None = None,
        adapter: str | Path | None = None,
        deterministic: bool | str = False,
        prefix_reuse: bool | str = True,
        padding: str = "right",
        seed: int = SAMPLING_SEED,
    ) -> None:
        super().__init__()
        self._batch_size = batch_rows(batch_size)
        if not isinstance(seed, int):
            raise EvalError(f"seed = {seed!r}; must be a whole number")
        if padding not in PADDING:
            raise EvalError(f"padding = {padding!r}; one of: {', '.join(PADDING)}")
        self._seed = seed
        self.padding = padding
        self._template: str | None = None
        if isinstance(pretrained, (str, Path)):
            from hcx.model.load import load_model

            loaded = load_model(
                pretrained, dtype=_dtype(dtype), device=_device(device), numerics=numerics, adapter=adapter
            )
        else:
            loaded = pretrained
        self.loaded = loaded
        self.decoder = loaded.decoder.eval()
        self.config = loaded.config
        self.pretrained = str(loaded.directory)
        self.tokenizer = transformers_tokenizer(loaded.tokenizer_directory)
        self.tokenizer = configure_pad_token(self.tokenizer)
        self.add_bos_token = add_bos_token
        self.numerics = numerics
        # lm-eval's command line gives texts.
        self.deterministic = str(deterministic).lower() == "true"
        self.prefix_reuse = str(prefix_reuse).lower() == "true"
        self._max_length = max_length
        self._device = next(self.decoder.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The end of text, which also conditions the first token when there is no BOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is conditioned on."""
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    @property
    def max_length(self) -> int:
        """The longest input in tokens."""
        return self._max_length or self.config.max_seq_len

    @property
    def max_gen_toks(self) -> int:
        """Generated tokens when a task does not say."""
        return 256

    @property
    def batch_size(self) -> int:
        """Rows per forward pass."""
        return self._batch_size

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._device

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's request cache."""
        return self.pretrained.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, with BOS where the tokenizer puts one and the text does not start with it."""
        special: dict[str, bool] = {}
        if add_special_tokens is not None:
            special = {"add_special_tokens": add_special_tokens}
        elif has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special = {"add_special_tokens": False}
        elif self.add_bos_token is not None:
            special = {"add_special_tokens": self.add_bos_token}
        return list(self.tokenizer.encode(string, **special))

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Log-probability (nats) of each continuation after its context, and whether it is the greedy one."""
        # Progress is shown below, and only on a terminal.
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of whole texts, in disjoint windows of `max_length` tokens.

        The first token is conditioned on the prefix token, the first of every later window on the token before it.
        """
        windows: list[tuple[int, Request]] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            for pair in utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((number, (None, *utils.make_disjoint_window(pair))))
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens([window for _, window in windows], disable_tqdm=disable_tqdm)
        for (number, _), (logprob, _) in zip(windows, answers, strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **options: Any
    ) -> list[Answer]:
        """Log-probability of each continuation and whether greedy decoding would have produced it."""
        # Equal inputs (the letters of one question) need one row: the logits depend on the input alone.
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            self._check_lengths(context, continuation)
            inputs = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            rows.setdefault(inputs, []).append(number)
        answers: list[Answer | None] = [None] * len(requests)
        with Progress("scoring", len(requests), "requests") as progress:
            for number, answer in self._answers(rows, requests):
                answers[number] = answer
                key = requests[number][0]
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answer)
                progress.advance()
        return [answer for answer in answers if answer is not None]

    def _answers(self, rows: dict[tuple[int, ...], list[int]], requests: list[Request]) -> Iterator[tuple[int, Answer]]:
        """Each request's answer, in the order of computation."""
        if self.prefix_reuse and not self.deterministic:
            from hcx.evals.prefix import LEAST_SAVED, PrefixScorer, families, saved_share

            longest = {inputs: max(len(requests[n][2]) for n in numbers) for inputs, numbers in rows.items()}
            found = families({inputs: len(inputs) - size for inputs, size in longest.items()})
            if saved_share(found, self.batch_size) >= LEAST_SAVED:
                scorer = PrefixScorer(self.decoder, self.config, self.batch_size, self.padding == "left")
                for batch, starts, hidden in scorer.run(found):
                    yield from self._score(batch, starts, hidden, rows, requests)
                return
        order = sorted(rows, key=lambda inputs: (-len(inputs), inputs))
        # One row of its own length at a time: no shape depends on the batch size, and so no rounding does.
        size = 1 if self.deterministic else self.batch_size
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            with torch.no_grad():
                hidden = self._hidden(batch)
            yield from self._score(batch, [0] * len(batch), hidden, rows, requests)

    def _check_lengths(self, context: list[int], continuation: list[int]) -> None:
        if not context or not continuation:
            raise EvalError("a request has an empty context or continuation after tokenisation; the task is malformed")
        if len(continuation) > self.max_length:
            raise EvalError(
                f"a continuation has {len(continuation)} tokens, the model takes {self.max_length}; "
                "score long texts with loglikelihood_rolling, or give a larger max_length"
            )

    @torch.no_grad()
    def _score(
        self,
        batch: Sequence[tuple[int, ...]],
        starts: Sequence[int],
        hidden: Tensor,
        rows: dict[tuple[int, ...], list[int]],
        requests: list[Request],
    ) -> Iterable[tuple[int, Answer]]:
        """Answers from the hidden states of rows, of which the first `starts` tokens have none."""
        # One entry per scored position: which hidden state predicts it. Requests of one row share its positions.
        # Rows are filled up on the right, or begin so much later.
        width = hidden.shape[0] if self.padding == "left" else None
        where_row: list[int] = []
        where_position: list[int] = []
        labels: list[int] = []
        spans: list[tuple[int, int, int]] = []
        for row, inputs in enumerate(batch):
            for number in rows[inputs]:
                continuation = requests[number][2]
                spans.append((number, len(labels), len(continuation)))
                where_row += [row] * len(continuation)
                end = width or len(inputs) - starts[row]
                where_position += range(end - len(continuation), end)
                labels += continuation
        logprobs, greedy = self._gather(hidden, where_row, where_position, labels)
        for number, start, length in spans:
            yield number, (float(logprobs[start : start + length].sum()), bool(greedy[start : start + length].all()))

    def _hidden(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """Final hidden states `[seq, batch, hidden]` of rows padded on one side."""
        width = max(map(len, batch))
        tokens = torch.zeros((len(batch), width), dtype=torch.long)
        meta = ForwardMeta()  # causal: what stands on the right is never seen
        if self.padding == "left":
            # What stands on the left is another document, which attention does not enter, and moves no position.
            positions, documents = torch.zeros_like(tokens), torch.zeros_like(tokens)
            for row, inputs in enumerate(batch):
                positions[row, width - len(inputs) :] = torch.arange(len(inputs))
                documents[row, width - len(inputs) :] = 1
            meta = ForwardMeta(positions.to(self.device), document_ids=documents.to(self.device))
        for row, inputs in enumerate(batch):
            first = width - len(inputs) if self.padding == "left" else 0
            tokens[row, first : first + len(inputs)] = torch.tensor(inputs, dtype=torch.long)
        hidden: Tensor = self.decoder(tokens.to(self.device), meta)
        return hidden

    def _gather(self, hidden: Tensor, row: list[int], position: list[int], labels: list[int]) -> tuple[Tensor, Tensor]:
        """Log-probability of each label and whether it is the most likely token, `[n]` each, on the CPU."""
        logprobs, greedy = [], []
        for start in range(0, len(labels), LOGIT_CHUNK):
            chunk = slice(start, start + LOGIT_CHUNK)
            index = (torch.tensor(position[chunk]), torch.tensor(row[chunk]))
            picked = hidden[index[0].to(hidden.device), index[1].to(hidden.device)].unsqueeze(1)
            logits = self.decoder.output(picked).logits()[0]
            label = torch.tensor(labels[chunk], device=logits.device)
            chosen = logits.gather(1, label.unsqueeze(1)).squeeze(1)
            logprobs.append((chosen - logits.logsumexp(-1)).double().cpu())
            greedy.append((logits.argmax(-1) == label).cpu())
        return torch.cat(logprobs), torch.cat(greedy)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until a stop string, the end of text, or the token limit."""
        results: list[str] = [""] * len(requests)
        eos = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        by_options: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_options.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        with Progress("generating", len(requests), "requests") as progress:
            for numbers in by_options.values():
                params = sampling_params(requests[numbers[0]].args[1], self.max_gen_toks, self._seed)
                until = [stop for stop in [*params.stop, eos] if stop]
                limit = params.max_tokens
                room = self.max_length - limit
                if room <= 0:
                    raise EvalError(
                        f"max_gen_toks = {limit} leaves no room for a prompt: the model takes {self.max_length} "
                        "tokens; give a smaller max_gen_toks"
                    )
                prompts = [
                    self.tok_encode(requests[number].args[0])[-room:] or [self.prefix_token_id] for number in numbers
                ]
                generator = Generator(
                    self.loaded, 1 if self.deterministic else self.batch_size, max_seq=max(map(len, prompts)) + limit
                )
                order = sorted(range(len(numbers)), key=lambda i: -len(prompts[i]))
                for start in range(0, len(order), GENERATION_ROUND * self.batch_size):
                    batch = order[start : start + GENERATION_ROUND * self.batch_size]
                    own = [replace(params, stop=tuple(until), seed=derived_seed(self._seed, numbers[i])) for i in batch]
                    completions = generator.generate([prompts[i] for i in batch], own)
                    for i, completion in zip(batch, completions, strict=True):
                        number = numbers[i]
                        results[number] = _before_stops(self.tok_decode(completion.token_ids), until)
                        self.cache_hook.add_partial("generate_until", requests[number].args, results[number])
                        progress.advance()
        return results

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that dialogues are written by from now on.

        Args:
            chat_template: True for the model's own, or the name of one where its tokenizer has several.

        Raises:
            EvalError: the model has no template, or none of that name.
        """
        if chat_template is False:
            return None
        own = self.tokenizer.chat_template
        if own is None:
            raise EvalError(f"{self.pretrained}: its tokenizer has no chat template; leave --apply_chat_template out")
        if isinstance(chat_template, str):
            if not isinstance(own, dict) or chat_template not in own:
                names = ", ".join(sorted(own)) if isinstance(own, dict) else "one, without a name"
                raise EvalError(
                    f"--apply_chat_template {chat_template}: no such template; {self.pretrained} has: {names}"
                )
            self._template = chat_template
        selected = super().chat_template(chat_template)
        return None if selected is None else str(selected)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialogue as the prompt that the model's chat template makes of it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.decoder.parameters()),
            "model_dtype": str(next(self.decoder.parameters()).dtype),
            "numerics": self.numerics,
            "directory": self.pretrained,
        }


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise EvalError(f"dtype = {dtype!r}; valid: float32, bfloat16, float16, auto")
    return found


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        raise EvalError(f"device = {name!r}; valid: cpu, cuda, cuda:0, cuda:1, ...") from None
    # torch keeps the number in 8 bits: "cuda:999" becomes a negative one.
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise EvalError(f"device = {name!r}: this machine shows {torch.cuda.device_count()} CUDA devices; use cpu")
    return device


def batch_rows(value: int | str) -> int:
    """Rows per forward pass from what a command line gives.

    Raises:
        EvalError: it is not a number of rows.
    """
    try:
        size = int(value)
    except ValueError:
        raise EvalError(f"batch_size = {value!r}; the hcx model takes a number of rows, for example 8") from None
    if size < 1:
        raise EvalError(f"batch_size = {size}; must be at least 1")
    return size


SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "repetition_penalty")


def sampling_params(given: Mapping[str, Any], default_limit: int, seed: int) -> SamplingParams:
    """lm-eval's generation options as ours; what we cannot do is refused, not ignored.

    Args:
        given: the options of a request, or of a command line.
        default_limit: new tokens where they do not say.
        seed: of sampling.

    Raises:
        EvalError: an option that the model cannot follow.
    """
    options = dict(normalize_gen_kwargs(dict(given), default_limit))
    until = tuple(stop for stop in options.pop("until", []) if stop)
    limit = int(options.pop("max_gen_toks"))
    samples = options.pop("do_sample", False)
    options = {name: value for name, value in options.items() if value is not None}
    if options.get("num_beams", 1) == 1:
        options.pop("num_beams", None)
    unknown = sorted(set(options) - set(SAMPLING_OPTIONS))
    if unknown:
        raise EvalError(
            f"generation option {unknown[0]} = {options[unknown[0]]!r}: the hcx model cannot do that; "
            f"supported: until, max_gen_toks, do_sample, {', '.join(SAMPLING_OPTIONS)}"
        )
    if not samples:
        options = {"repetition_penalty": options.get("repetition_penalty", 1.0), "temperature": 0.0}
    elif not options.get("temperature"):
        options["temperature"] = 1.0
    return SamplingParams(max_tokens=limit, stop=until, seed=seed, **options)


def _before_stops(text: str, until: Sequence[str]) -> str:
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text
