"""`hcx bench compress`: our quantizers beside other libraries', at equal or fewer bytes, on one model and one text.

Every contender gets the same weights and the same statistics of the same calibration text (training documents),
gathered from the full-precision model in one pass, and is scored on the same rows of held-out documents. Group sizes of
our methods are the smallest that take no more bytes than the leanest peer at that width. The difference to the best of
ours is paired by row.

`bcq-mixed` gives each block's attention and MLP planes of their own, as many on average as asked for, by sensitivities
that are read on held-out documents behind those that are scored. Between whole numbers of bits it stands alone: the
budget lies between those of its neighbours, and peers get the lower width with the smallest groups that fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hcx.artifacts import digest_file
from hcx.compress import Calibration, CompressPlan, InputStatistics, ModulePlan, collect
from hcx.compress.calibration_text import calibration_batches
from hcx.compress.sensitivity import groups_of
from hcx.data import MicroBatch, ShardSet, validation_batches, validation_bytes
from hcx.errors import ConfigError
from hcx.kernels.format import PackedWeight
from hcx.model.decoder import Decoder
from hcx.model.load import LoadedModel, ModelFiles, load_model
from hcx.model.meta import ForwardMeta
from hcx.model.parts.sources import DenseSource
from hcx.obs import get_logger
from hcx.obs.machine import cpu_name
from hcx.recipe.allocation import DEFAULT_READING, Reading, Sensitivities, allocation_of, read_sensitivities
from hcx.recipe.compress_peers import Peer
from hcx.recipe.quality import Estimate, ratio_estimate

GROUP_STEP = 32
"""Our group sizes are multiples of it, as the kernels' tiles are."""
FITTED: dict[str, Any] = {"method": "alternating", "feedback": True, "descent": 8}
OURS: dict[str, dict[str, Any]] = {
    "bcq": FITTED,
    "bcq-offset": {**FITTED, "offset": True},
    "bcq-feedback": {"method": "alternating", "feedback": True, "descent": 0},
    "bcq-importance": {"method": "alternating", "importance": True},
    "bcq-plain": {"method": "alternating"},
    "bcq-mixed": FITTED,
    "bcq-nested": FITTED,
    "grid": {"method": "searched", "feedback": True, "descent": 8},
}
"""Settings of our contenders, by the name that `--methods` takes; bits and group size come from the budget."""
MIXED, NESTED = "bcq-mixed", "bcq-nested"
SENSITIVITY_WIDTHS = (1, 2, 3, 4, 5, 6)
SENSITIVITY_GROUP = 128
"""Inputs per scale while sensitivities are read: about what 2 to 4 planes get beside peers with groups of 64."""
PEER_GROUPS = (16, 32, 64, 128, 256)
"""Group sizes that peers may take between whole numbers of bits, best first."""
SAME_WEIGHT = 1e-5
"""A contender that moves no weight by more than this, relative to the largest, has found the model's own grid."""


Documents = int | Mapping[str, int] | None


@dataclass(frozen=True)
class CompressRow:
    """One contender in one language.

    Attributes:
        model, model_digest: what was quantized.
        contender, library, version: what quantized it.
        bits: planes, or bits of a code; the average asked for where they differ by layer.
        group_size: inputs per scale.
        bits_per_weight: everything counted that the format stores.
        language: of the held-out text.
        kl, kl_low, kl_high: divergence from full precision, nats per token, 95 % interval over rows.
        kl_excess, kl_excess_low, kl_excess_high: its KL less the best of ours at these bits, paired by row.
        bits_per_byte, bits_per_byte_low, bits_per_byte_high: of the compressed model.
        bits_per_byte_excess, bits_per_byte_excess_low, bits_per_byte_excess_high: the same for bits per byte, less
            those of ours with the smallest KL.
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
    bits: float
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
    bits_per_byte_excess: float
    bits_per_byte_excess_low: float
    bits_per_byte_excess_high: float
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
    quantize: Callable[[str, Tensor, InputStatistics], Tensor]
    """(module, weight, statistics) -> the weight as it would be read back."""


def group_within(bits: float, budget: float, offset: bool) -> int:
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
    widths: Sequence[float],
    methods: Sequence[str],
    peers: dict[str, Peer],
    group_size: int,
    calibration: Calibration,
    seq_len: int = 256,
    max_documents: Documents = None,
    by: str = "layer",
    reading: Reading = DEFAULT_READING,
    sensitivities: Path | None = None,
) -> Iterator[CompressRow]:
    """Quantizes with every contender at every width, and scores each.

    Args:
        model: a full-precision MODEL directory.
        shards_directory: made with its tokenizer; training documents calibrate, held-out ones score.
        widths: bits; between whole numbers only `bcq-mixed` and the peers take part.
        methods: ours, of `OURS`.
        peers: of `find_peers`.
        group_size: of the peers.
        calibration: how much text, of which languages.
        seq_len: tokens per scored row.
        max_documents: scored per language, one number or one for each language; all if not given.
        by: what `bcq-mixed` gives planes to: `layer`, `type` or `matrix`.
        reading: what it reads of each language, behind the documents that are scored.
        sensitivities: a file that what it read is kept in; read from there if there is one.

    Raises:
        ConfigError: an unknown method, methods and widths that do not go together, too little held-out text, a
            contender that reproduces the model's own grid, or kept sensitivities of other settings.
    """
    _check_methods(methods, widths, peers)
    shards = ShardSet.open(shards_directory)
    limits = _limits(shards, max_documents)
    digest = next((digest_file(path) for path in sorted(model.glob("*.safetensors"))), "")
    plan = read = None
    if MIXED in methods:
        # Whatever is wrong with these is said before the calibration.
        groups_of((), by)
        _check_documents(shards, None if max_documents is None else limits)
        reading = replace(reading, seq_len=seq_len, first_documents=limits)
        plan = _SensitivityPlan(shards, by, reading, calibration, digest, sensitivities)
        read = plan.kept()
    loaded = load_model(model)
    batches = calibration_batches(calibration, loaded.config.max_seq_len, loaded.tokenizer, shards)
    log = get_logger(__name__)
    with ModelFiles(model) as files:
        if files.modules:
            raise ConfigError(f"{model}: already binary-coded; the comparison starts from full precision")
        log.info("calibrating on %d tokens", sum(batch.tokens.numel() for batch in batches))
        statistics = dict(collect(files.config, files.read, batches))
    held_out = _held_out(loaded, shards, seq_len, limits)
    dense = {stem: _weight(loaded.decoder, stem).clone() for stem in loaded.decoder.linears()}
    shared = (str(model), digest, sum(batch.tokens.numel() for batch in batches))
    if plan is not None and read is None:
        read = plan.read(model, statistics)
    nested = _Nested([int(bits) for bits in widths], OURS[NESTED])
    for bits in widths:
        contenders = _contenders(bits, methods, peers, group_size, read, nested)
        scores: dict[str, dict[str, _Scores]] = {}
        for one in contenders:
            log.info("%s, %g bits", one.name, bits)
            _replace(loaded.decoder, dense, statistics, one)
            scores[one.name] = {name: _score(loaded.decoder, rows) for name, rows in held_out.items()}
        for language, rows in held_out.items():
            ours = [one.name for one in contenders if one.library == "hcx" and one.name in OURS]
            best = min(ours or [contenders[0].name], key=lambda name: sum(scores[name][language].kl))
            for one in contenders:
                yield _row(one, bits, language, rows, scores[one.name][language], scores[best][language], shared)


@dataclass(frozen=True)
class _SensitivityPlan:
    """What `bcq-mixed` reads, and the file that it is kept in, if any."""

    shards: ShardSet
    by: str
    reading: Reading
    calibration: Calibration
    model_digest: str
    path: Path | None

    @property
    def quantizer(self) -> ModulePlan:
        """That of `bcq-mixed` itself: what a layer suffers from plain planes is not what it suffers."""
        return ModulePlan(group_size=SENSITIVITY_GROUP, **OURS[MIXED])

    def settings(self) -> dict[str, Any]:
        """What kept sensitivities must have been read with."""
        return {
            "model_digest": self.model_digest,
            "shards_digest": self.shards.digest,
            "by": self.by,
            "widths": SENSITIVITY_WIDTHS,
            "quantizer": self.quantizer.model_dump(mode="json"),
            "reading": asdict(self.reading),
            "calibration": self.calibration.model_dump(mode="json"),
        }

    def kept(self) -> Sensitivities | None:
        """Those of the file, if there is one.

        Raises:
            ConfigError: they were read with other settings, or the file cannot be written later.
            DataError: the file has none.
        """
        if self.path is None:
            return None
        if self.path.exists():
            return Sensitivities.kept(self.path, self.settings())
        if not self.path.absolute().parent.is_dir():
            raise ConfigError(f"--sensitivities {self.path}: there is no directory {self.path.absolute().parent}")
        return None

    def read(self, model: Path, statistics: Mapping[str, InputStatistics]) -> Sensitivities:
        """Reads them, and keeps them."""
        log = get_logger(__name__)
        log.info("reading sensitivities of %d widths", len(SENSITIVITY_WIDTHS))
        found = read_sensitivities(
            model,
            self.shards.directory,
            self.quantizer,
            SENSITIVITY_WIDTHS,
            by=self.by,
            reading=self.reading,
            progress=log.info,
            statistics=statistics,
        )
        if self.path is not None:
            found.keep(self.path, self.settings())
        return found


def _check_methods(methods: Sequence[str], widths: Sequence[float], peers: dict[str, Peer]) -> None:
    for name in methods:
        if name not in OURS:
            raise ConfigError(f"--methods {name}: no such method; valid: {', '.join(OURS)}")
    broken = [bits for bits in widths if bits != int(bits)]
    if broken and MIXED not in methods:
        raise ConfigError(f"--bits {broken[0]:g}: not a whole number of planes; add --methods {MIXED}")
    if NESTED in methods and (peers or broken or len(widths) < 2):
        raise ConfigError(
            f"--methods {NESTED} is one artifact of several whole widths, with groups of one size that cannot match "
            "the bytes of peers; give --bits 2,3,4 and --peers ''"
        )


def _check_documents(shards: ShardSet, limits: Mapping[str, int] | None) -> None:
    """Refuses to read sensitivities on documents that are scored too."""
    if limits is None:
        raise ConfigError(
            f"--methods {MIXED} reads sensitivities on held-out documents behind those that are scored: say with "
            "--max-documents how many are scored"
        )
    for language, scored in limits.items():
        found = shards.shard(language, "validation").num_documents
        if found <= scored:
            raise ConfigError(
                f"--max-documents {scored}: {language} has {found} held-out documents, and {MIXED} reads "
                "sensitivities on those behind; score fewer"
            )


def _limits(shards: ShardSet, max_documents: Documents) -> dict[str, int]:
    """How many documents are scored of each language that has any.

    Raises:
        ConfigError: the languages named are not those that there are.
    """
    known = {name: shards.shard(name, "validation").num_documents for name in shards.languages}
    known = {name: count for name, count in known.items() if count}
    if max_documents is None or isinstance(max_documents, int):
        return {name: count if max_documents is None else max_documents for name, count in known.items()}
    if set(max_documents) != set(known):
        raise ConfigError(
            f"--max-documents names {', '.join(max_documents)}; there are documents in {', '.join(known)}"
        )
    return dict(max_documents)


class _Nested:
    """Each weight at several widths, quantized once."""

    def __init__(self, widths: Sequence[int], settings: dict[str, Any]) -> None:
        self._widths, self._settings = tuple(sorted(widths)), settings
        self._found: dict[str, PackedWeight] = {}

    def at(self, bits: int, group_size: int, stem: str, weight: Tensor, statistics: InputStatistics) -> Tensor:
        if stem not in self._found:
            plan = ModulePlan(bits=self._widths[-1], widths=self._widths, group_size=group_size, **self._settings)
            packed = plan.quantize(weight, statistics)
            assert isinstance(packed, PackedWeight)
            self._found[stem] = packed
        return self._found[stem].at(bits).dequantize()


def budget_of(bits: float, peers: dict[str, Peer], group_size: int) -> float:
    """Bits per weight of the leanest peer, scales and zero points counted; in proportion between whole numbers."""
    low, high = (
        min(
            (peer.bits_per_weight(whole, group_size) for peer in peers.values()),
            default=whole + 16 * whole / group_size,
        )
        for whole in (math.floor(bits), math.ceil(bits))
    )
    return low + (bits - math.floor(bits)) * (high - low)


def _contenders(
    bits: float,
    methods: Sequence[str],
    peers: dict[str, Peer],
    group_size: int,
    read: Sensitivities | None,
    nested: _Nested,
) -> list[_Contender]:
    budget = budget_of(bits, peers, group_size)
    whole = bits == int(bits)
    found = [_ours(name, bits, budget, read, nested) for name in methods if whole or name == MIXED]
    for name, peer in peers.items():
        width = math.floor(bits)
        fitting = (size for size in PEER_GROUPS if peer.bits_per_weight(width, size) <= budget)
        size = group_size if whole else next(fitting, None)
        if size is not None:
            found.append(_theirs(name, peer, width, size))
    return found


def _ours(name: str, bits: float, budget: float, read: Sensitivities | None, nested: _Nested) -> _Contender:
    settings = OURS[name]
    offset = bool(settings.get("offset")) or settings["method"] == "searched"
    size = group_within(bits, budget, offset)
    average, by_module = bits, {}
    if name == MIXED:
        assert read is not None
        planned = allocation_of(read, bits, CompressPlan(default=ModulePlan(group_size=size)))
        average = planned.average_bits
        by_module = {stem: planned.allocation.bits[group] for group, stems in read.groups.items() for stem in stems}

    def quantize(stem: str, weight: Tensor, statistics: InputStatistics) -> Tensor:
        if name == NESTED:
            return nested.at(int(bits), size, stem, weight, statistics)
        plan = ModulePlan(bits=by_module.get(stem, int(bits)), group_size=size, **settings)
        return plan.quantize(weight, statistics).dequantize()

    cost = average + (16 * average + (32 if offset else 0)) / size
    return _Contender(name, "hcx", "", size, cost, quantize)


def _theirs(name: str, peer: Peer, bits: int, size: int) -> _Contender:
    def quantize(stem: str, weight: Tensor, statistics: InputStatistics) -> Tensor:
        return peer.quantize(weight, statistics, bits, size)

    return _Contender(name, peer.library, peer.version, size, peer.bits_per_weight(bits, size), quantize)


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
        found = contender.quantize(stem, weight, statistics[stem])
        moved = max(moved, float((found - weight).abs().max() / weight.abs().max().clamp(min=1e-12)))
        _weight(decoder, stem).copy_(found)
    if moved < SAME_WEIGHT:
        raise ConfigError(
            f"{contender.name} with groups of {contender.group_size} gives the model's own weights back: they were "
            "quantized on that grid before. Such a comparison says nothing; choose other bits or another --group-size"
        )


@torch.no_grad()
def _held_out(loaded: LoadedModel, shards: ShardSet, seq_len: int, limits: Mapping[str, int]) -> dict[str, _Rows]:
    found = {}
    for language, limit in limits.items():
        batches = list(validation_batches(shards, language, min(seq_len, loaded.config.max_seq_len), 8, limit))
        if sum(batch.tokens.shape[0] for batch in batches) < 2:
            raise ConfigError(
                f"{language} has one row of held-out text; an interval needs two: raise --max-documents, or score "
                "shards with more held-out documents"
            )
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
    bits: float,
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
    more = ratio_estimate([a - b for a, b in zip(scores.nats, best.nats, strict=True)], rows.counts, to_bits)
    return CompressRow(
        model=shared[0],
        model_digest=shared[1],
        contender=one.name,
        library=one.library,
        version=one.version or (version("hcx-llm") if one.library == "hcx" else ""),
        bits=int(bits) if bits == int(bits) else bits,
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
        bits_per_byte_excess=more.value,
        bits_per_byte_excess_low=more.low,
        bits_per_byte_excess_high=more.high,
        bits_per_byte_full=rows.nats / math.log(2) / rows.num_bytes,
        top1=sum(scores.same) / total,
        tokens=round(total),
        calibration_tokens=shared[2],
        device=cpu_name(),
    )
