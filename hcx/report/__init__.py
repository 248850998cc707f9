"""One self-contained HTML page over artifact directories: curves, compression, evaluation, samples and the ledger."""

from hcx.report.evidence import Evidence, collect
from hcx.report.page import render, write_report

__all__ = ["Evidence", "collect", "render", "write_report"]
