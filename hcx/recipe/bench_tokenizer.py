"""`hcx bench tokenizer`: megabytes per second of encoding, beside the libraries that others encode with.

All read the same vocabulary and the same documents, so that the work is the same: `tokenizers` the same file,
`tiktoken` the same tokens as ranks under the same pattern, `sentencepiece` the model that the merges came from, on text
already mapped to the byte alphabet and without the pre-split. In a round each runs once, the first by turns, so that a
noisy machine disturbs all alike; a result is the median of the paired ratios with a bootstrap interval. Words that were
seen before come out of the caches of `tokenizers`, which hcx encodes with: that is how text is.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal

from hcx.obs.machine import cpu_name
from hcx.recipe.bench_train import median_interval
from hcx.tokenizer import Tokenizer
from hcx.tokenizer.alphabet import BYTE_OF, to_alphabet, to_bytes
from hcx.tokenizer.sentencepiece_bpe import SENTENCEPIECE_FILE

Mode = Literal["one by one", "batch"]
Encode = Callable[[], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class TokenizerRow:
    """One library on one text; `ratio` above 1 means that hcx is faster.

    Attributes:
        text: name of the text.
        mode: documents one by one on one thread, or all in one call on `threads`.
        library, version: what encoded.
        vocab_size: number of ids.
        num_bytes: of the text.
        rounds: that the medians are over.
        mb_per_s: 10^6 bytes of UTF-8 per second, median.
        ratio, ratio_low, ratio_high: its time by hcx's in the same round, with a 95 % interval.
        same_ids: whether the ids are those of hcx.
        threads: that it could use.
        device: the processor.
    """

    text: str
    mode: Mode
    library: str
    version: str
    vocab_size: int
    num_bytes: int
    rounds: int
    mb_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    same_ids: bool
    threads: int
    device: str

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON."""
        return asdict(self)


def measure_encoding(
    tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]], mode: Mode, rounds: int
) -> list[TokenizerRow]:
    """Times every library that is installed.

    Args:
        tokenizer: one of ours.
        texts: name -> documents.
        mode: one by one, or in one call.
        rounds: measured after one for warmth.
    """
    rows = []
    threads = 1 if mode == "one by one" else os.cpu_count() or 1
    for name, documents in texts.items():
        runs = _contenders(tokenizer, documents, mode, threads)
        ids = {library: [list(row) for row in run()] for library, (_, run) in runs.items()}
        times = _interleave({library: run for library, (_, run) in runs.items()}, rounds)
        num_bytes = sum(len(document.encode()) for document in documents)
        for library, (release, _) in runs.items():
            ratios = [theirs / ours for theirs, ours in zip(times[library], times["hcx"], strict=True)]
            low, high = median_interval(ratios)
            rows.append(
                TokenizerRow(
                    text=name,
                    mode=mode,
                    library=library,
                    version=release,
                    vocab_size=tokenizer.vocab_size,
                    num_bytes=num_bytes,
                    rounds=rounds,
                    mb_per_s=num_bytes / 1e6 / statistics.median(times[library]),
                    ratio=statistics.median(ratios),
                    ratio_low=low,
                    ratio_high=high,
                    same_ids=ids[library] == ids["hcx"],
                    threads=threads,
                    device=cpu_name(),
                )
            )
    return rows


def _interleave(runs: Mapping[str, Encode], rounds: int) -> dict[str, list[float]]:
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            begun = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - begun)
    return times


def _contenders(
    tokenizer: Tokenizer, documents: Sequence[str], mode: Mode, threads: int
) -> dict[str, tuple[str, Encode]]:
    """Library -> (version, encodes the documents). Libraries that are not installed are left out."""
    import hcx

    texts = list(documents)
    batch = mode == "batch"
    encode = tokenizer.encode
    found: dict[str, tuple[str, Encode]] = {
        "hcx": (
            hcx.__version__,
            (lambda: tokenizer.encode_batch(texts)) if batch else (lambda: [encode(text) for text in texts]),
        ),
        "tokenizers": (version("tokenizers"), _tokenizers(tokenizer, texts, batch)),
    }
    for library, make in (("tiktoken", _tiktoken), ("sentencepiece", _sentencepiece)):
        try:
            run = make(tokenizer, texts, batch, threads)
        except ImportError:
            continue
        if run is not None:
            found[library] = (version(library), run)
    return found


def _tokenizers(tokenizer: Tokenizer, texts: list[str], batch: bool) -> Encode:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(tokenizer.tokenizer_json)
    backend.encode_special_tokens = True
    if batch:
        return lambda: [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return lambda: [backend.encode(text, add_special_tokens=False).ids for text in texts]


def _tiktoken(tokenizer: Tokenizer, texts: list[str], batch: bool, threads: int) -> Encode | None:
    import tiktoken

    parsed = json.loads(tokenizer.tokenizer_json)
    vocabulary = {token: number for token, number in parsed["model"]["vocab"].items() if set(token) <= BYTE_OF.keys()}
    ranks = {to_bytes(token): number for token, number in vocabulary.items() if number not in _special(tokenizer)}
    pattern = parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    encoding = tiktoken.Encoding("hcx", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    if batch:
        return lambda: encoding.encode_ordinary_batch(texts, num_threads=threads)
    return lambda: [encoding.encode_ordinary(text) for text in texts]


def _sentencepiece(tokenizer: Tokenizer, texts: list[str], batch: bool, threads: int) -> Encode | None:
    import sentencepiece

    model = tokenizer.companions.get(SENTENCEPIECE_FILE)
    if model is None:
        return None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    mapped = [to_alphabet(text) for text in texts]
    if batch:
        return lambda: processor.encode(mapped, num_threads=threads)
    return lambda: [processor.encode(text) for text in mapped]


def _special(tokenizer: Tokenizer) -> set[int]:
    return set(tokenizer.special_tokens.values())
