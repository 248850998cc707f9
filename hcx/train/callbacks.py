"""Observers of a run."""

from __future__ import annotations

from collections.abc import Mapping

from hcx.engine.base import StepStats


class Callback:
    """Observes a run; every hook has a neutral default and runs on every rank."""

    def after_step(self, step: int, stats: StepStats, metrics: dict[str, float]) -> None:
        """After optimizer step `step` (counted from 1); may add metrics."""

    def after_validation(self, step: int, values: Mapping[str, float]) -> None:
        """After a validation."""
