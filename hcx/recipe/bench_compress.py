"""`hcx bench compress`: our quantizers beside other libraries', at equal or fewer bytes, on one model and one text.

Every contender gets the same weights and the same statistics of the same calibration text (training documents),
gathered from the full-precision model in one pass, and is scored on the same rows of held-out documents. Group sizes of
our methods are the smallest that take no more bytes than the leanest peer at that width. The difference to the best of
ours is paired by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcx.artifacts import digest_file
from hcx.compress import Calibration, InputStatistics, ModulePlan, collect
from hcx.compress.calibration_text import calibration_batches
from hcx.data import MicroBatch, ShardSet, validation_batches, validation_bytes
from hcx.errors import ConfigError
from hcx.model.decoder import Decoder
from hcx.model.load import LoadedModel, ModelFiles, load_model
from hcx.model.meta import ForwardMeta
from hcx.model.parts.sources import DenseSource
from hcx.obs import get_logger
from hcx.obs.machine import cpu_name
from hcx.recipe.compress_peers import Peer
from hcx.recipe.quality import Estimate, ratio_estimate

GROUP_STEP = 32
"""Our group sizes are multiples of it, as the kernels' tiles are."""
OURS: dict[str, dict[str, Any]] = {
    "bcq": {"method": "alternating", "feedback": True, "descent": 8},
    "bcq-offset": {"method": "alternating", "feedback": True, "descent": 8, "offset": True},
    "bcq-feedback": {"method": "alternating", "feedback": True, "descent": 0},
    "bcq-importance": {"method": "alternating", "importance": True},
    "bcq-plain": {"method": "alternating"},
    "grid": {"method": "searched", "feedback": True, "descent": 8},
}
"""Settings of our contenders, by the name that `--methods` takes; bits and group size come from the budget."""
SAME_WEIGHT = 1e-5
"""A contender that moves no weight by more than this, relative to the largest, has found the model's own grid."""


@dataclass(frozen=True)
class CompressRow:
    """One contender in one language.

    Attributes:
        model, model_digest: what was quantized.
        contender, library, version: what quantized it.
        bits: planes, or bits of a code.
        group_size: inputs per scale.
        bits_per_weight: everything counted that the format stores.
        language: of the held-out text.
        kl, kl_low, kl_high: divergence from full precision, nats per token, 95 % interval over rows.
        kl_excess, kl_excess_low, kl_excess_high: its KL less the best of ours at these bits, paired by row.
        bits_per_byte, bits_per_byte_low, bits_per_byte_high: of the compressed model.
        bits_per_byte_full: of the full-precision model.
        top1: share of positions with the same most likely token.
        tokens: held-out tokens scored.
        calibration_tokens: read by those who read any.
        device: the processor.
    """

    model: str
    model_digest: str
    contender: str
    library: str
    version: str
    bits: int
    group_size: int
    bits_per_weight: float
    language: str
    kl: float
    kl_low: float
    kl_high: float
    kl_excess: float
    kl_excess_low: float
    kl_excess_high: float
    bits_per_byte: float
    bits_per_byte_low: float
    bits_per_byte_high: float
    bits_per_byte_full: float
    top1: float
    tokens: int
    calibration_tokens: int
    device: str

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON."""
        return asdict(self)


@dataclass
class _Scores:
    """Sums per held-out row."""

    nats: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same: list[float] = field(default_factory=list)


@dataclass
class _Rows:
    """Held-out text of one language, with what the full-precision model made of it."""

    batches: list[MicroBatch]
    hidden: list[Tensor]
    counts: list[float]
    num_bytes: int
    nats: float


@dataclass(frozen=True)
class _Contender:
    name: str
    library: str
    version: str
    group_size: int
    bits_per_weight: float
    quantize: Callable[[Tensor, InputStatistics], Tensor]


def group_within(bits: int, budget: float, offset: bool) -> int:
    """The smallest group size, in steps of 32, whose scales (and offset) fit a budget of bits per weight.

    Raises:
        ConfigError: nothing is left for scales.
    """
    room = budget - bits
    if room <= 0:
        raise ConfigError(f"{budget} bits per weight leave no room for the scales of {bits} planes")
    # Rounded down before it is rounded up: 192.00000001 is 192.
    return GROUP_STEP * math.ceil(round((16 * bits + (32 if offset else 0)) / room, 6) / GROUP_STEP)


def measure(
    model: Path,
    shards_directory: Path,
    widths: Sequence[int],
    methods: Sequence[str],
    peers: dict[str, Peer],
    group_size: int,
    calibration: Calibration,
    seq_len: int = 256,
    max_documents: int | None = None,
) -> Iterator[CompressRow]:
    """Quantizes with every contender at every width, and scores each.

    Args:
        model: a full-precision MODEL directory.
        shards_directory: made with its tokenizer; training documents calibrate, held-out ones score.
        widths: bits.
        methods: ours, of `OURS`.
        peers: of `find_peers`.
        group_size: of the peers.
        calibration: how much text, of which languages.
        seq_len: tokens per scored row.
        max_documents: scored per language; all if not given.

    Raises:
        ConfigError: an unknown method, or a contender reproduces the model's own grid.
    """
    for name in methods:
        if name not in OURS:
            raise ConfigError(f"--methods {name}: no such method; valid: {', '.join(OURS)}")
    shards, loaded = ShardSet.open(shards_directory), load_model(model)
    batches = calibration_batches(calibration, loaded.config.max_seq_len, loaded.tokenizer, shards)
    log = get_logger(__name__)
    with ModelFiles(model) as files:
        if files.modules:
            raise ConfigError(f"{model}: already binary-coded; the comparison starts from full precision")
        log.info("calibrating on %d tokens", sum(batch.tokens.numel() for batch in batches))
        statistics = dict(collect(files.config, files.read, batches))
    held_out = _held_out(loaded, shards, seq_len, max_documents)
    digest = next((digest_file(path) for path in sorted(model.glob("*.safetensors"))), "")
    dense = {stem: _weight(loaded.decoder, stem).clone() for stem in loaded.decoder.linears()}
    shared = (str(model), digest, sum(batch.tokens.numel() for batch in batches))
    for bits in widths:
        contenders = _contenders(bits, methods, peers, group_size)
        scores: dict[str, dict[str, _Scores]] = {}
        for one in contenders:
            log.info("%s, %d bits", one.name, bits)
            _replace(loaded.decoder, dense, statistics, one)
            scores[one.name] = {name: _score(loaded.decoder, rows) for name, rows in held_out.items()}
        for language, rows in held_out.items():
            ours = [one.name for one in contenders if one.library == "hcx" and one.name in OURS]
            best = min(ours or [contenders[0].name], key=lambda name: sum(scores[name][language].kl))
            for one in contenders:
                yield _row(one, bits, language, rows, scores[one.name][language], scores[best][language], shared)


def _contenders(bits: int, methods: Sequence[str], peers: dict[str, Peer], group_size: int) -> list[_Contender]:
    budget = min(
        (peer.bits_per_weight(bits, group_size) for peer in peers.values()),
        default=bits + 16 * bits / group_size,
    )
    found = []
    for name in methods:
        settings = OURS[name]
        offset = bool(settings.get("offset")) or settings["method"] == "searched"
        size = group_within(bits, budget, offset)
        plan = ModulePlan(bits=bits, group_size=size, **settings)
        found.append(
            _Contender(
                name,
                "hcx",
                "",
                size,
                bits + (16 * bits + (32 if offset else 0)) / size,
                lambda weight, statistics, plan=plan: plan.quantize(weight, statistics).dequantize(),  # type: ignore[misc]
            )
        )
    for name, peer in peers.items():
        found.append(
            _Contender(
                name,
                peer.library,
                peer.version,
                group_size,
                peer.bits_per_weight(bits, group_size),
                lambda weight, statistics, peer=peer: peer.quantize(weight, statistics, bits, group_size),  # type: ignore[misc]
            )
        )
    return found


def _weight(decoder: Decoder, stem: str) -> Tensor:
    part = decoder.linears()[stem]
    block = next(one for one in part.blocks if one.stem == stem)
    source = part.source
    assert isinstance(source, DenseSource)
    return source.weight[block.rows[0] : block.rows[1]]


@torch.no_grad()
def _replace(
    decoder: Decoder, dense: dict[str, Tensor], statistics: dict[str, InputStatistics], contender: _Contender
) -> None:
    """Puts the contender's weights in; refuses one that gives the model's own weights back."""
    moved = 0.0
    for stem, weight in dense.items():
        found = contender.quantize(weight, statistics[stem])
        moved = max(moved, float((found - weight).abs().max() / weight.abs().max().clamp(min=1e-12)))
        _weight(decoder, stem).copy_(found)
    if moved < SAME_WEIGHT:
        raise ConfigError(
            f"{contender.name} with groups of {contender.group_size} gives the model's own weights back: they were "
            "quantized on that grid before. Such a comparison says nothing; choose other bits or another --group-size"
        )


@torch.no_grad()
def _held_out(loaded: LoadedModel, shards: ShardSet, seq_len: int, limit: int | None) -> dict[str, _Rows]:
    found = {}
    for language in shards.languages:
        if shards.shard(language, "validation").num_documents == 0:
            continue
        batches = list(validation_batches(shards, language, min(seq_len, loaded.config.max_seq_len), 8, limit))
        hidden, counts, nats = [], [], 0.0
        for batch in batches:
            made = loaded.decoder(batch.tokens, _meta(batch))
            hidden.append(made)
            counts += [float(n) for n in (batch.weights > 0).sum(1)]
            logprobs = loaded.decoder.output(made).token_logprobs(batch.labels)
            nats -= float(logprobs[batch.weights > 0].double().sum())
        found[language] = _Rows(batches, hidden, counts, validation_bytes(shards, language, limit), nats)
    return found


@torch.no_grad()
def _score(decoder: Decoder, rows: _Rows) -> _Scores:
    scores = _Scores()
    for batch, reference in zip(rows.batches, rows.hidden, strict=True):
        hidden = decoder(batch.tokens, _meta(batch))
        for row in range(batch.tokens.shape[0]):
            # One row at a time: logits of a large vocabulary are never held for a whole batch.
            counted = batch.weights[row] > 0
            full = decoder.output(reference[:, row : row + 1]).logits()[0, counted].log_softmax(-1)
            found = decoder.output(hidden[:, row : row + 1]).logits()[0, counted].log_softmax(-1)
            scores.kl.append(float((full.exp() * (full - found)).sum(dtype=torch.float64)))
            scores.nats.append(-float(found.gather(-1, batch.labels[row][counted, None]).double().sum()))
            scores.same.append(float((full.argmax(-1) == found.argmax(-1)).sum()))
    return scores


def _meta(batch: MicroBatch) -> ForwardMeta:
    return ForwardMeta(positions=batch.positions, document_ids=batch.document_ids)


def _row(
    one: _Contender,
    bits: int,
    language: str,
    rows: _Rows,
    scores: _Scores,
    best: _Scores,
    shared: tuple[str, str, int],
) -> CompressRow:
    total = sum(rows.counts)
    to_bits = total / rows.num_bytes / math.log(2)
    kl: Estimate = ratio_estimate(scores.kl, rows.counts)
    excess = ratio_estimate([a - b for a, b in zip(scores.kl, best.kl, strict=True)], rows.counts)
    bpb = ratio_estimate(scores.nats, rows.counts, to_bits)
    return CompressRow(
        model=shared[0],
        model_digest=shared[1],
        contender=one.name,
        library=one.library,
        version=one.version or (version("hcx-llm") if one.library == "hcx" else ""),
        bits=bits,
        group_size=one.group_size,
        bits_per_weight=one.bits_per_weight,
        language=language,
        kl=kl.value,
        kl_low=kl.low,
        kl_high=kl.high,
        kl_excess=excess.value,
        kl_excess_low=excess.low,
        kl_excess_high=excess.high,
        bits_per_byte=bpb.value,
        bits_per_byte_low=bpb.low,
        bits_per_byte_high=bpb.high,
        bits_per_byte_full=rows.nats / math.log(2) / rows.num_bytes,
        top1=sum(scores.same) / total,
        tokens=round(total),
        calibration_tokens=shared[2],
        device=cpu_name(),
    )
