"""`hcx bench train --dropbp`: what dropping the backward saves, measured beside what it should save.

One model in one process, three contenders: nothing dropped, our mechanism, and the published one (a branch's graph is
built and thrown away) with the same masks. They take the same batch in turn, so that a noisy machine disturbs all
alike; figures are medians of ratios within a round, with bootstrap intervals. The mask rules are compared apart, each
at the share of work that it really dropped: the published rule drops more than it is asked to.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hcx.data.batch import MicroBatch
from hcx.dist import Topology
from hcx.dropbp import MaskSchedule, StepCosts, Trained
from hcx.dropbp.masks import Mask, Rule
from hcx.model.adapters import LoRA, LoRAConfig
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.flops import parameter_count
from hcx.model.meta import ForwardMeta
from hcx.model.parts.base import PlainParts
from hcx.model.transforms import TransformContext
from hcx.model.weights import InitWeights, load_weights
from hcx.obs.machine import cpu_name
from hcx.recipe.bench_train import median_interval, random_batch
from hcx.train import NextToken

BACKWARD_BAND, TOTAL_BAND, STORED_BAND = 0.08, 0.06, 0.06
"""How far measured ratios may lie above (total: from) what the dropped share predicts."""
RULES: tuple[Rule, ...] = ("exact", "reference", "bernoulli")
ADAPTER = LoRAConfig(rank=8)


@dataclass(frozen=True)
class DropCase:
    """One comparison.

    Attributes:
        name: of the shape.
        model: the shape.
        rows, seq_len: of a micro-batch.
        rate: target drop rate.
        training: all weights, or low-rank updates of all matrices.
        checkpointing: kept sublayers are computed again.
        rule: of the masks.
    """

    name: str
    model: ModelConfig
    rows: int
    seq_len: int
    rate: float
    training: Literal["full", "lora"] = "full"
    checkpointing: bool = False
    rule: Rule = "exact"

    @property
    def adapter(self) -> LoRAConfig | None:
        """The updates that are trained, if not all weights are."""
        return ADAPTER if self.training == "lora" else None

    @property
    def trained(self) -> Trained:
        """What gets gradients."""
        return Trained() if self.adapter is None else Trained.updates(self.adapter, self.model)


@dataclass(frozen=True)
class DropRow:
    """The outcome of a case. Ratios are to the step that drops nothing; `total` is forward and backward.

    `stored` is the peak of what autograd keeps in the forward, without the output matrix and the loss.

    `total_predicted` takes a backward to be as much longer than the forward as its operations are more;
    `total_predicted_by_time` takes `backward_over_forward`, the median of their times in the step that drops nothing.
    Low-rank updates make the difference: many small products for few operations. `inside` tells whether backward, total
    and stored activations lie in the bands above, `inside_by_time` the same with the second prediction.
    `over_published` is the time of forward and backward of ours over that of the published mechanism: 1 or less is at
    least as fast.
    """

    case: str
    parameters: int
    rows: int
    seq_len: int
    training: str
    checkpointing: bool
    rule: str
    rate: float
    realised: float
    pairs: int
    total: float
    total_low: float
    total_high: float
    total_predicted: float
    total_predicted_by_time: float
    backward_over_forward: float
    backward: float
    backward_low: float
    backward_high: float
    backward_predicted: float
    step: float
    stored: float
    stored_predicted: float
    published_total: float
    published_stored: float
    over_published: float
    over_published_low: float
    over_published_high: float
    device_memory: float | None
    inside: bool
    inside_by_time: bool
    device: str
    precision: str
    threads: int
    torch: str

    def as_dict(self) -> dict[str, Any]:
        """For CSV and JSON."""
        return asdict(self)


def shape(hidden: int, layers: int, inner: int, vocab: int = 1024) -> ModelConfig:
    """A llama with heads of 64 and half as many key heads. The vocabulary is small: the head is never dropped."""
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=hidden // 64,
        num_kv_heads=max(1, hidden // 128),
        max_seq_len=65536,
    )


def drop_cases(quick: bool, cuda: bool) -> list[DropCase]:
    """What is measured: rates, then lengths, full and low-rank training, with and without checkpointing, then rules."""
    if quick:
        return [DropCase("tiny", shape(128, 4, 352), 2, 64, 0.5)]
    name, model, tokens = ("14M", shape(384, 8, 1024), 2048)
    lengths: Sequence[int] = (256, 512, 1024, 2048)
    if cuda:
        name, model, tokens, lengths = "1B", shape(2048, 20, 5632, 32768), 8192, (2048, 4096, 8192)
    usual = tokens // lengths[1], lengths[1]
    found = []
    for training in ("full", "lora"):
        for checkpointing in (False, True):
            found += [DropCase(name, model, *usual, rate, training, checkpointing) for rate in (0.5, 0.75, 0.875)]
            found += [
                DropCase(name, model, tokens // length, length, 0.875, training, checkpointing)
                for length in lengths
                if length != lengths[1]
            ]
    found += [DropCase(name, model, *usual, rate, rule=rule) for rate in (0.5, 0.875) for rule in RULES[1:]]
    return found


class StoredBytes:
    """Bytes that autograd keeps for the backward: each storage once, weights apart; now, and at the most."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self._users: dict[int, int] = {}
        self.now = self.peak = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Counts what is saved within."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor):
            yield

    def _pack(self, tensor: Tensor) -> _Kept:
        return _Kept(self, tensor)

    def take(self, tensor: Tensor, users: int) -> None:
        """One more, or one less, user of a tensor's storage."""
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer in self._weights:
            return
        before = self._users.get(pointer, 0)
        self._users[pointer] = before + users
        if (before == 0) != (before + users == 0):
            self.now += users * storage.nbytes()
        self.peak = max(self.peak, self.now)


class _Kept:
    """A saved tensor, for as long as autograd keeps it."""

    def __init__(self, counter: StoredBytes, tensor: Tensor) -> None:
        # Detached: a saved output would keep its own graph alive.
        self.counter, self.tensor = counter, tensor.detach()
        counter.take(self.tensor, 1)

    def __del__(self) -> None:
        self.counter.take(self.tensor, -1)


class _Bench:
    """A model with what a step of training needs, and its masks."""

    def __init__(self, case: DropCase) -> None:
        self.case = case
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        dtype = torch.bfloat16 if cuda else torch.float32
        self.precision = "bf16" if cuda else "fp32"
        self.decoder = Decoder(case.model, PlainParts(torch.float32, self.device))
        load_weights(self.decoder, self.decoder.parameter_map(), InitWeights(case.model, 0))
        if case.adapter is not None:
            LoRA(case.adapter, 0).apply(self.decoder, TransformContext(case.model, Topology()))
        self.decoder.to(dtype)
        self.decoder.activation_checkpointing = case.checkpointing
        trained = [parameter for parameter in self.decoder.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        self.schedule = MaskSchedule(1, (case.rate,) * case.model.num_sublayers, case.rate, case.rule)
        self.costs = StepCosts(case.model, case.seq_len, case.trained, case.checkpointing)
        self.objective = NextToken()

    def batch(self, number: int) -> MicroBatch:
        """Random tokens."""
        case = self.case
        return random_batch(case.model.vocab_size, case.rows, case.seq_len, number, self.device)

    def forward(self, batch: MicroBatch, mask: Mask | None, published: bool) -> Tensor:
        """The mean loss."""
        self.decoder.drop_mechanism = "detach" if published else "no_grad"
        output = self.decoder.output(self.decoder(batch.tokens, ForwardMeta(batch.positions, dropbp_mask=mask)))
        total, _ = self.objective(output, batch)
        return total / self.objective.weight(batch)

    def timed(self, batch: MicroBatch, mask: Mask | None, published: bool) -> tuple[float, float, float]:
        """Seconds of the forward, of the backward, and of the whole step."""
        start = self._now()
        loss = self.forward(batch, mask, published)
        middle = self._now()
        if loss.requires_grad:
            loss.backward()
        end = self._now()
        self.optimizer.step()
        # Zeros, as engines with flat buffers have them: a missing gradient is a zero one.
        self.optimizer.zero_grad(set_to_none=False)
        return middle - start, end - middle, self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def stored(self, batch: MicroBatch, mask: Mask | None, published: bool) -> int:
        """Bytes of stored activations at their peak in one forward, without the output matrix and the loss."""
        counter = StoredBytes(self.decoder)
        self.decoder.drop_mechanism = "detach" if published else "no_grad"
        with counter.watch():
            hidden = self.decoder(batch.tokens, ForwardMeta(batch.positions, dropbp_mask=mask))
        del hidden
        return counter.peak

    def memory(self, batch: MicroBatch, mask: Mask | None) -> int:
        """Bytes of a GPU in use at the peak of a step."""
        torch.cuda.reset_peak_memory_stats()
        self.timed(batch, mask, published=False)
        return int(torch.cuda.max_memory_allocated())


_Times = tuple[float, float, float]


def _ratios(
    rounds: Sequence[tuple[_Times, _Times, _Times]], which: Callable[[_Times], float], top: int, below: int
) -> list[float]:
    return [which(found[top]) / which(found[below]) for found in rounds]


def total_by_time(backward: float, backward_over_forward: float) -> float:
    """Forward and backward, to that without drops, when `backward` is what is left of the backward.

    DropBP's model of time, (1 + beta (1 - p)) / (1 + beta), with beta as measured instead of counted.
    """
    return (1 + backward_over_forward * backward) / (1 + backward_over_forward)


def measure_drop(case: DropCase, pairs: int, warmup: int = 3) -> DropRow:
    """Alternates steps of the three contenders, each first by turns."""
    bench = _Bench(case)
    batches = [bench.batch(number) for number in range(4)]
    rounds: list[tuple[_Times, _Times, _Times]] = []
    masks: list[Mask] = []
    gc.collect()
    for number in range(warmup + pairs):
        mask, batch = bench.schedule.mask(number, 0), batches[number % len(batches)]
        contenders: list[tuple[Mask | None, bool]] = [(None, False), (mask, False), (mask, True)]
        times: dict[int, _Times] = {}
        for turn in range(3):
            index = (number + turn) % 3
            times[index] = bench.timed(batch, *contenders[index])
        if number >= warmup:
            rounds.append((times[0], times[1], times[2]))
            masks.append(mask)
    saving = bench.costs.saving(masks)
    whole = saving.forward + saving.backward_whole

    def both(times: _Times) -> float:
        return times[0] + times[1]

    total, backward = _ratios(rounds, both, 1, 0), _ratios(rounds, lambda times: times[1], 1, 0)
    over = _ratios(rounds, both, 1, 2)
    none = bench.stored(batches[0], None, published=False)
    stored = statistics.mean(bench.stored(batches[0], mask, published=False) for mask in masks) / none
    published_stored = statistics.mean(bench.stored(batches[0], mask, published=True) for mask in masks) / none
    memory = None
    if bench.device.type == "cuda":
        memory = bench.memory(batches[0], masks[0]) / bench.memory(batches[0], None)
    total_low, total_high = median_interval(total)
    backward_low, backward_high = median_interval(backward)
    over_low, over_high = median_interval(over)
    total_predicted, kept = (saving.forward + saving.backward) / whole, 1 - saving.weighted_rate
    backward_predicted = saving.backward / saving.backward_whole
    slower = statistics.median(times[0][1] / times[0][0] for times in rounds)
    by_time = total_by_time(backward_predicted, slower)
    took, took_backward = statistics.median(total), statistics.median(backward)
    others = took_backward <= kept + BACKWARD_BAND and stored <= kept + STORED_BAND
    return DropRow(
        case=case.name,
        parameters=parameter_count(case.model),
        rows=case.rows,
        seq_len=case.seq_len,
        training=case.training,
        checkpointing=case.checkpointing,
        rule=case.rule,
        rate=case.rate,
        realised=saving.weighted_rate,
        pairs=pairs,
        total=took,
        total_low=total_low,
        total_high=total_high,
        total_predicted=total_predicted,
        total_predicted_by_time=by_time,
        backward_over_forward=slower,
        backward=took_backward,
        backward_low=backward_low,
        backward_high=backward_high,
        backward_predicted=backward_predicted,
        step=statistics.median(_ratios(rounds, lambda times: times[2], 1, 0)),
        stored=stored,
        stored_predicted=saving.stored,
        published_total=statistics.median(_ratios(rounds, both, 2, 0)),
        published_stored=published_stored,
        over_published=statistics.median(over),
        over_published_low=over_low,
        over_published_high=over_high,
        device_memory=memory,
        inside=others and abs(took - total_predicted) <= TOTAL_BAND,
        inside_by_time=others and abs(took - by_time) <= TOTAL_BAND,
        device=torch.cuda.get_device_name() if bench.device.type == "cuda" else cpu_name(),
        precision=bench.precision,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def longest_sequence(rate: float, training: Literal["full", "lora"] = "lora", unit: int = 1024) -> int:
    """The longest row, in multiples of `unit` tokens, whose step of the 1B shape fits on this GPU at a drop rate.

    Doubles until it does not fit, then halves the gap; one row per step.
    """
    model = shape(2048, 20, 5632, 32768)

    def fits(length: int) -> bool:
        bench = None
        try:
            bench = _Bench(DropCase("1B", model, 1, length, rate, training))
            bench.timed(bench.batch(0), bench.schedule.mask(0, 0), published=False)
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            del bench
            gc.collect()
            torch.cuda.empty_cache()
        return True

    good, bad = 0, 1
    while fits(bad * unit):
        good, bad = bad, 2 * bad
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * unit) else (good, middle)
    return good * unit
