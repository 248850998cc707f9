"""The section on dropped backward passes: what was dropped and saved, and how sensitivities became rates."""

from __future__ import annotations

import math
import statistics

from hcx.report import plots
from hcx.report.evidence import Evidence, Run
from hcx.report.markup import figure, figures, section
from hcx.report.sections import trained_run

RATE, SAVED, STORED = "dropbp/rate", "dropbp/flops_saved", "dropbp/stored_activations"
SENSITIVITY = "dropbp/sensitivity"


def dropbp(evidence: Evidence) -> str:
    """The section; empty for a run that dropped nothing."""
    run = trained_run(evidence)
    if run is None or not run.series(RATE)[0]:
        return ""
    rates, saved, stored = (run.series(name)[1] for name in (RATE, SAVED, STORED))
    lead = (
        f"In the median step {statistics.median(rates):.1%} of the residual sublayers had no backward pass. By count "
        f"that saves {statistics.median(saved):.1%} of the operations of forward and backward"
        + (f", and stores {statistics.median(stored):.1%} of the activations." if stored else ".")
        + " Operations are not time: hcx bench train --dropbp measures that."
    )
    sensitivity, chosen = _by_sublayer(run, SENSITIVITY), _by_sublayer(run, RATE)
    found = []
    if sensitivity and all(math.isfinite(value) for value in sensitivity):
        log = min(sensitivity) > 0
        found.append(
            figure(
                plots.by_sublayer("Sensitivity", "change of the gradient", sensitivity, log),
                "What dropping one sublayer alone changes in the gradient of one row, measured once during the run.",
            )
        )
    if chosen:
        found.append(
            figure(
                plots.by_sublayer("Drop rate", "share of micro-batches", chosen),
                "From the probe to the end; before it, all rates were equal.",
            )
        )
    if not found:
        lead += " All sublayers had the same rate."
    return section("Dropped backward passes", lead, figures(*found))


def _by_sublayer(run: Run, prefix: str) -> list[float]:
    """The last values of `PREFIX/0`, `PREFIX/1`, ... as long as there are some; NaN where one is no number."""
    values: list[float] = []
    while any(f"{prefix}/{len(values)}" in row for row in run.rows):
        value = run.last(f"{prefix}/{len(values)}")
        values.append(math.nan if value is None else value)
    return values
