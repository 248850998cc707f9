"""A run in stages: the same model, optimizer and tokens per step, at another sequence length.

HyperCLOVA X trained 90 % of its tokens at 4,096 tokens per row and the rest at 32,768 (technical report, arXiv
2404.01954, section 2). A stage is a share of the run's tokens. Because every step has equally many tokens, that is the
share of its steps too, and the batch shrinks as the rows grow.

Sample numbers: step t of a stage takes the samples [t * G, (t + 1) * G) of the order at that stage's sequence length,
where G is the stage's batch and t counts from the run's start. G times the length is constant, so the position in an
epoch, measured in tokens, goes on where the stage before it stopped. Rows of another length are another cut of the same
shuffled documents in another order: in the epoch in which a switch falls, a text may come twice or not at all.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from hcx.config import Config
from hcx.data.batch import MicroBatch
from hcx.errors import CheckpointError, ConfigError
from hcx.train.loader import Loader


class StageConfig(Config):
    """A part of the run at one sequence length."""

    share: float
    """Of the run's tokens; the shares of all stages sum to 1."""
    seq_len: int
    """Tokens per row."""
    rope_theta: float | None = None
    """Base of the rotary embedding from here on; as before if not given."""
    micro_batch: int | None = None
    """Rows per forward; as many tokens as `train.micro_batch` rows of `data.seq_len` if not given, at least 1."""


@dataclass(frozen=True)
class Stage:
    """A stage in steps and rows.

    Attributes:
        first_step, stop_step: steps `first_step` to `stop_step - 1`, counted from 0.
        seq_len: tokens per row.
        global_batch, micro_batch: rows per step and per forward.
        rope_theta: base of the rotary embedding.
    """

    first_step: int
    stop_step: int
    seq_len: int
    global_batch: int
    micro_batch: int
    rope_theta: float


def plan_stages(
    stages: Sequence[StageConfig], steps: int, global_batch: int, micro_batch: int, seq_len: int, rope_theta: float
) -> tuple[Stage, ...]:
    """The stages in steps and rows; one over the whole run if none are given.

    Args:
        stages: in order.
        steps: of the whole run.
        global_batch, micro_batch, seq_len: rows per step and per forward, tokens per row: their product is the rule
            for every stage.
        rope_theta: before a stage says otherwise.

    Raises:
        ConfigError: shares do not sum to 1, a stage has no step, or a sequence length does not divide the tokens of a
            step.
    """
    if not stages:
        return (Stage(0, steps, seq_len, global_batch, micro_batch, rope_theta),)
    total = sum(stage.share for stage in stages)
    if abs(total - 1.0) > 1e-6 or any(stage.share <= 0 for stage in stages):
        raise ConfigError(f"train.stages: shares must be above 0 and sum to 1; they sum to {total:g}")
    tokens = global_batch * seq_len
    planned: list[Stage] = []
    done, first, theta = 0.0, 0, rope_theta
    for number, stage in enumerate(stages):
        done += stage.share
        stop = steps if number == len(stages) - 1 else round(done * steps)
        if stop <= first:
            raise ConfigError(f"train.stages.{number}.share = {stage.share:g}: not one of train.steps = {steps} steps")
        if stage.seq_len < 1 or tokens % stage.seq_len:
            raise ConfigError(
                f"train.stages.{number}.seq_len = {stage.seq_len}: must divide the tokens of a step, "
                f"train.global_batch x data.seq_len = {global_batch} x {seq_len} = {tokens}"
            )
        theta = theta if stage.rope_theta is None else stage.rope_theta
        rows = stage.micro_batch or max(1, micro_batch * seq_len // stage.seq_len)
        planned.append(Stage(first, stop, stage.seq_len, tokens // stage.seq_len, rows, theta))
        first = stop
    return tuple(planned)


def stage_at(plan: Sequence[Stage], step: int) -> Stage:
    """The stage of a step; the last one after the run's end."""
    return next((stage for stage in plan if step < stage.stop_step), plan[-1])


class StagedLoader:
    """The loaders of all stages as one (`Loader`).

    Args:
        plan: the stages.
        loaders: one per stage, at its sequence length.
    """

    def __init__(self, plan: Sequence[Stage], loaders: Sequence[Loader]) -> None:
        self._parts = list(zip(plan, loaders, strict=True))
        self._done = 0

    def batches(
        self,
        start_step: int,
        stop_step: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        *,
        threads: int,
    ) -> Generator[list[MicroBatch]]:
        """See `Loader.batches`; the stages say how many rows a step has."""
        for stage, loader in self._parts:
            first, stop = max(start_step, stage.first_step), min(stop_step, stage.stop_step)
            if first >= stop:
                continue
            steps = loader.batches(
                first, stop, stage.global_batch, stage.micro_batch, dp_rank, dp_size, threads=threads
            )
            with closing(steps):
                for step, batch in enumerate(steps, first):
                    self._done = step + 1
                    yield batch

    def state_dict(self) -> dict[str, Any]:
        """The stages that have begun, and the state of the one that the last step belonged to."""
        begun = [asdict(stage) for stage, _ in self._parts if stage.first_step < max(1, self._done)]
        # A stage that goes on may end elsewhere when the run goes on: only what is past is fixed.
        begun[-1]["stop_step"] = None
        return {"stages": begun, "loader": self._parts[len(begun) - 1][1].state_dict(), "step": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a state was taken; a run without stages may go on as the first stage of one with them.

        Raises:
            CheckpointError: a stage that has begun is another one now.
            DataError: the order of the data would be another.
        """
        if "stages" not in state:
            stage, loader = self._parts[0]
            loader.load_state_dict(state)
            self._done = int(state["next_sample"]) // stage.global_batch
            if self._done > stage.stop_step:
                raise CheckpointError(
                    f"train.stages.0 ends at step {stage.stop_step}, but the checkpoint was written without stages at "
                    f"step {self._done}: give the first stage a share of at least what is done"
                )
            return
        saved, self._done = state["stages"], int(state["step"])
        mine = self.state_dict()["stages"]
        for number, was in enumerate(saved):
            now = mine[number] if number < len(mine) else None
            if now != was:
                raise CheckpointError(
                    f"train.stages.{number} was {was} when the checkpoint was written, now {now}: stages that have "
                    "begun cannot change"
                )
        self._parts[len(saved) - 1][1].load_state_dict(state["loader"])
