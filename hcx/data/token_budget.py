"""Batches of whole conversations under a token budget, in an order that depends on nothing but the seed.

HyperCLOVA X report, section on SFT: sequences of similar length go together, and the number of tokens in a mini-batch
is fixed, not the number of sequences. Here, precisely:

- An *epoch* puts the samples in a random order and takes them window by window. Within a window they are sorted by
  length, longest first (equal lengths stay in their random order), and cut into steps. What is too little for a step
  goes on into the next window; the last step of an epoch may be smaller. Then the steps are put in a random order.
- A *step* has a fixed number of micro-batches over all replicas, all of one shape `[rows, seq_len]`: `seq_len` is the
  step's longest sample, rounded up, and `rows = budget // seq_len`. One shape for a step, because pipeline schedules
  send one shape; rows that are left over in an epoch's last step are empty.
- Which samples a step holds depends on the seed, the epoch and the step; replicas share out its micro-batches in order.

So every sample comes once in an epoch, no micro-batch holds more than the budget, and the number of replicas changes
nothing: the loss is normalised by the trained tokens of the whole step.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcx.data.batch import MicroBatch
from hcx.data.chat_samples import ChatSamples
from hcx.data.order import next_sample, prepared_ahead
from hcx.dist.seeding import derived_seed
from hcx.errors import ConfigError


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step over all replicas.

    Attributes:
        samples: numbers of its samples; sample j goes to micro-batch `j % micro_batches`.
        rows, seq_len: shape of every micro-batch.
        micro_batches: over all replicas.
    """

    samples: NDArray[np.int64]
    rows: int
    seq_len: int
    micro_batches: int

    @property
    def places(self) -> int:
        """Tokens that are computed, filling included."""
        return self.rows * self.seq_len * self.micro_batches


def plan_epoch(
    lengths: NDArray[np.int64], budget: int, micro_batches: int, window: int, multiple: int, random: np.random.Generator
) -> list[StepPlan]:
    """The steps of one epoch.

    Args:
        lengths: tokens of each sample.
        budget: tokens of a micro-batch at most, filling included.
        micro_batches: per step, over all replicas.
        window: samples among which lengths are sorted: a larger one fills less and mixes less.
        multiple: row lengths are rounded up to a multiple of it.
        random: of the epoch.
    """
    order = random.permutation(len(lengths))
    steps: list[StepPlan] = []
    left = order[:0]
    for begin in range(0, len(order), window):
        pool = np.concatenate([left, order[begin : begin + window]])
        pool = pool[np.argsort(-lengths[pool], kind="stable")]
        is_last = begin + window >= len(order)
        while len(pool):
            seq_len = rounded_up(int(lengths[pool[0]]), multiple)
            rows = budget // seq_len
            if len(pool) < rows * micro_batches:
                if not is_last:
                    break
                rows = -(-len(pool) // micro_batches)
            taken, pool = np.split(pool, [min(rows * micro_batches, len(pool))])
            steps.append(StepPlan(taken, rows, seq_len, micro_batches))
        left = pool
    return [steps[place] for place in random.permutation(len(steps))]


def rounded_up(length: int, multiple: int) -> int:
    """The smallest multiple that is not below a length."""
    return -(-length // multiple) * multiple


class TokenBudgetLoader:
    """Micro-batches of a fixed number of tokens.

    Args:
        samples: the conversations.
        global_batch: tokens per optimizer step over all replicas, filling included.
        micro_batch: tokens per micro-batch; divides `global_batch`.
        seed: of the order.
        window, multiple: see `plan_epoch`.

    Raises:
        ConfigError: the sizes do not divide, or the longest sample does not fit a micro-batch.
    """

    def __init__(
        self,
        samples: ChatSamples,
        global_batch: int,
        micro_batch: int,
        seed: int = 0,
        window: int = 4096,
        multiple: int = 8,
    ) -> None:
        if min(global_batch, micro_batch, window, multiple) < 1 or global_batch % micro_batch:
            raise ConfigError(
                f"global_batch = {global_batch} tokens is not a multiple of micro_batch = {micro_batch} tokens"
            )
        longest = rounded_up(int(samples.lengths.max()), multiple)
        if longest > micro_batch:
            raise ConfigError(
                f"micro_batch = {micro_batch} tokens cannot hold the longest conversation, which fills {longest}; "
                "raise it, or lower data.seq_len"
            )
        self.samples, self.seed, self.window, self.multiple = samples, seed, window, multiple
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.next_sample = 0
        """Samples that the steps so far have taken, counted over epochs."""
        self._lengths = samples.lengths
        self._first_steps = [0]
        self._lock = threading.Lock()
        # Two epochs are in use where one ends.
        self.epoch_plan = lru_cache(maxsize=3)(self._plan)
        self._digest = samples.digest

    def _plan(self, epoch: int) -> list[StepPlan]:
        """The steps of an epoch, in order."""
        random = np.random.Generator(np.random.PCG64(derived_seed(self.seed, "chat", epoch)))
        micro_batches = self.global_batch // self.micro_batch
        return plan_epoch(self._lengths, self.micro_batch, micro_batches, self.window, self.multiple, random)

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, number within it) of a step; epochs may differ by a step or two."""
        with self._lock:
            while self._first_steps[-1] <= step:
                epoch = len(self._first_steps) - 1
                self._first_steps.append(self._first_steps[-1] + len(self.epoch_plan(epoch)))
            epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
            return epoch, step - self._first_steps[epoch]

    def step_plan(self, step: int) -> StepPlan:
        """What a step holds."""
        epoch, number = self.epoch_of(step)
        return self.epoch_plan(epoch)[number]

    def samples_before(self, step: int) -> int:
        """Samples that the steps before `step` take, counted over epochs."""
        epoch, number = self.epoch_of(step)
        return epoch * len(self.samples) + sum(len(plan.samples) for plan in self.epoch_plan(epoch)[:number])

    def padding(self, step: int) -> float:
        """The share of a step's computed tokens that belong to no sample."""
        plan = self.step_plan(step)
        return 1 - int(self._lengths[plan.samples].sum()) / plan.places

    def epoch_padding(self, epoch: int = 0) -> float:
        """`padding` over a whole epoch."""
        return 1 - int(self._lengths.sum()) / sum(plan.places for plan in self.epoch_plan(epoch))

    def step_batch(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> list[MicroBatch]:
        """A replica's micro-batches of a step, all of one shape."""
        plan = self.step_plan(step)
        share = plan.micro_batches // dp_size
        mine = range(dp_rank * share, (dp_rank + 1) * share)
        return [
            self.samples.micro_batch(plan.samples[number :: plan.micro_batches].tolist(), plan.rows, plan.seq_len)
            for number in mine
        ]

    def batches(
        self,
        start_step: int,
        stop_step: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        threads: int = 0,
    ) -> Generator[list[MicroBatch]]:
        """The micro-batches of one replica in steps `start_step` to `stop_step - 1`, prepared ahead by threads.

        Raises:
            ConfigError: the replicas cannot share the micro-batches evenly.
        """
        if (global_batch, micro_batch) != (self.global_batch, self.micro_batch) or global_batch % (
            micro_batch * dp_size
        ):
            raise ConfigError(
                f"global_batch = {global_batch} tokens is not a multiple of micro_batch = {micro_batch} tokens times "
                f"{dp_size} data-parallel ranks"
            )
        for step, batch in prepared_ahead(
            lambda number: self.step_batch(number, dp_rank, dp_size), start_step, stop_step, threads
        ):
            self.next_sample = self.samples_before(step + 1)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """What must agree for the order to go on, and where it stands."""
        return {
            "samples": self._digest,
            "seed": self.seed,
            "micro_batch": self.micro_batch,
            "window": self.window,
            "multiple": self.multiple,
            "next_sample": self.next_sample,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was taken.

        Raises:
            DataError: the loader is not the one that the state describes; the first difference is named.
        """
        self.next_sample = next_sample(state, self.state_dict())


def held_out_batches(samples: ChatSamples, budget: int, multiple: int = 8) -> Iterator[MicroBatch]:
    """Every sample once, for scoring: sorted by length, under the same budget."""
    lengths = samples.lengths
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        seq_len = rounded_up(int(lengths[order[begin]]), multiple)
        rows = max(1, budget // seq_len)
        chosen = order[begin : begin + rows].tolist()
        yield samples.micro_batch(chosen, len(chosen), seq_len)
        begin += rows
