"""DropBP as a method that hooks into training: masks before forwards, a probe between steps, what was saved after."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from hcx.dropbp.accounting import EVERYTHING, Saving, StepCosts, Trained
from hcx.dropbp.allocation import allocate, usable
from hcx.dropbp.branches import SwitchedBranches
from hcx.dropbp.config import DropBPConfig
from hcx.dropbp.masks import Mask, MaskSchedule, uneven_stages
from hcx.dropbp.sensitivity import measure_sensitivity
from hcx.errors import CheckpointError, ConfigError
from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta
from hcx.model.transforms import EditsMasters, GradientSource, ModelTransform, TransformContext
from hcx.obs import get_logger

log = get_logger(__name__)

FIXED = ("rate", "mask_rule", "hold_steps")
"""What a resumed run must not change: the masks would be others."""


class DropBP(ModelTransform):
    """Drops the backward of random residual sublayers (Woo et al. 2024, arXiv 2402.17812).

    Args:
        config: rate, rule, allocation.
        model: the decoder's shape.
        steps: of the whole run, for the place of the probe.
        seed: of the masks.
        stages: chunks of blocks over all pipeline stages, where `config.stages` leaves them open.
        trained: what gets gradients, for the accounting.
        checkpointing: kept sublayers are computed again in the backward, for the accounting.

    Put it after every transform that changes sublayers. On our decoder the mask travels in `ForwardMeta`; a foreign
    model gets switches around its branches, which `context` sets.
    """

    def __init__(
        self,
        config: DropBPConfig,
        model: ModelConfig,
        *,
        steps: int,
        seed: int,
        stages: int = 1,
        trained: Trained = EVERYTHING,
        checkpointing: bool = False,
    ) -> None:
        self.config, self._model, self._seed = config, model, seed
        self._stages = config.stages or stages
        self._trained, self._checkpointing = trained, checkpointing
        self._probe_step = None if config.allocation == "uniform" else int(config.probe_at * steps)
        self._probed = False
        self.sensitivity: tuple[float, ...] = ()
        self._override: Mask | None = None
        self._foreign: list[SwitchedBranches] = []
        self._costs: dict[int, StepCosts] = {}
        self._drawn: dict[int, Mask] = {}
        self._seq_len = model.max_seq_len
        self._news: dict[str, float] = {}
        self._use_rates((config.rate,) * model.num_sublayers)
        if config.mask_rule == "exact":
            realised = self.schedule.count * self._stages / model.num_sublayers
            if abs(realised - config.rate) > 0.005:
                log.warning(
                    "dropbp.rate = %g: %d sublayers in %d stages drop whole numbers, so the rate is %.3g",
                    config.rate,
                    model.num_sublayers,
                    self._stages,
                    realised,
                )

    @property
    def rates(self) -> tuple[float, ...]:
        """The drop rate that each sublayer has now."""
        exact = self.config.mask_rule == "exact"
        return self.schedule.probabilities if exact else self.schedule.rates

    def _use_rates(self, rates: tuple[float, ...]) -> None:
        self.schedule = MaskSchedule(
            self._seed, rates, self.config.rate, self.config.mask_rule, self._stages, self.config.hold_steps
        )

    def apply(self, chunk: nn.Module, context: TransformContext) -> None:
        """See `ModelTransform.apply`.

        Raises:
            ConfigError: the model has no residual sublayers that are known, or stages cut across pipeline stages.
        """
        if context.config.num_sublayers != self._model.num_sublayers:
            raise ValueError("the transform was made for another model")
        problem = uneven_stages(self._stages, context.topology.pp_size, context.chunks)
        if problem is not None:
            raise ConfigError(problem)
        if isinstance(chunk, Decoder):
            chunk.drop_mechanism = self.config.mechanism
            return
        branches = SwitchedBranches(chunk, self.config.mechanism)
        if branches.count != self._model.num_sublayers:
            raise ConfigError(f"DropBP: {branches.count} branches were found, expected {self._model.num_sublayers}")
        self._foreign.append(branches)

    def before_step(self, step: int) -> None:
        """See `ModelTransform.before_step`."""
        self._drawn.clear()

    def context(self, step: int, micro_batch: int, meta: ForwardMeta) -> ForwardMeta:
        """See `ModelTransform.context`: the mask of this micro-batch."""
        mask = self._override
        if mask is None:
            mask = self.schedule.mask(step, micro_batch)
            self._drawn[micro_batch] = mask
        if meta.positions is not None:
            self._seq_len = meta.positions.shape[1]
        for branches in self._foreign:
            branches.use(mask)
        return replace(meta, dropbp_mask=mask)

    def probe(self, step: int, gradients: GradientSource) -> None:
        """See `ModelTransform.probe`: measures sensitivities once, and gives the sublayers their rates."""
        if self._probed or self._probe_step is None or step < self._probe_step:
            return
        self._probed = True
        try:
            found = measure_sensitivity(
                gradients, self._set_override, len(self.rates), self.config.sens_metric, self.config.probe_rows
            )
        finally:
            self._override = None
        self.sensitivity = tuple(found)
        if usable(found):
            self._use_rates(self._allocated(found))
        else:
            log.warning(
                "DropBP: the sensitivities before step %d say nothing (%s): all rates stay %g. A loss or gradient that "
                "is not finite comes from bad data or too high a learning rate; zeros, from rows without targets",
                step + 1,
                ", ".join(f"{value:g}" for value in found[:4]) + (", ..." if len(found) > 4 else ""),
                self.config.rate,
            )
        for index, (sensitivity, rate) in enumerate(zip(found, self.rates, strict=True)):
            self._news[f"dropbp/sensitivity/{index}"] = sensitivity
            self._news[f"dropbp/rate/{index}"] = rate

    def _set_override(self, mask: Mask) -> None:
        self._override = mask

    def _allocated(self, sensitivity: list[float]) -> tuple[float, ...]:
        """Each stage has the same budget in proportion to its own operations, so that none waits for another."""
        config, weights = self.config, self.costs(self._seq_len).weights()
        size = len(weights) // self._stages
        rates: list[float] = []
        for start in range(0, len(weights), size):
            part = slice(start, start + size)
            chosen = sensitivity[part]
            if not any(chosen):  # nothing of this stage matters: any rates do
                rates += [config.rate] * size
                continue
            rates += allocate(
                chosen, weights[part], config.rate, config.floor, config.cap, config.allocation == "flops_aware"
            )
        return tuple(rates)

    def costs(self, seq_len: int) -> StepCosts:
        """Operations and stored activations at a sequence length."""
        if seq_len not in self._costs:
            self._costs[seq_len] = StepCosts(self._model, seq_len, self._trained, self._checkpointing)
        return self._costs[seq_len]

    def saving(self) -> Saving | None:
        """What the masks of the current step save; None before its first forward."""
        masks = list(self._drawn.values())
        return self.costs(self._seq_len).saving(masks) if masks else None

    def after_step(self, step: int, engine: EditsMasters) -> dict[str, float]:
        """See `ModelTransform.after_step`: the step's drop rate and what it saved."""
        metrics, self._news = self._news, {}
        saving = self.saving()
        if saving is not None:
            metrics |= {
                "dropbp/rate": saving.rate,
                "dropbp/flops_saved": saving.flops_saved,
                "dropbp/stored_activations": saving.stored,
            }
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """See `ModelTransform.state_dict`."""
        return {
            "kind": "dropbp",
            "seed": self._seed,
            "stages": self._stages,
            "fixed": {name: getattr(self.config, name) for name in FIXED},
            "probed": self._probed,
            "rates": list(self.schedule.rates),
            "sensitivity": [str(value) for value in self.sensitivity],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ModelTransform.load_state_dict`.

        Raises:
            CheckpointError: the masks would be others than those of the run that goes on.
        """
        if state.get("kind") != "dropbp":
            return  # written without DropBP: it begins here
        now = {"stages": self._stages, "seed": self._seed, **{name: getattr(self.config, name) for name in FIXED}}
        was = {"stages": state["stages"], "seed": state["seed"], **state["fixed"]}
        for name, value in was.items():
            if now[name] != value:
                raise CheckpointError(
                    f"dropbp.{name} was {value} when the checkpoint was written, now {now[name]}: the masks would be "
                    f"others; set dropbp.{name}={value}"
                    if name != "seed"
                    else f"seed was {value} when the checkpoint was written, now {now[name]}: the masks would be others"
                )
        self._probed = bool(state["probed"])
        self.sensitivity = tuple(float(value) for value in state["sensitivity"])
        self._use_rates(tuple(float(rate) for rate in state["rates"]))
