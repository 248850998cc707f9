"""Compression of trained weights to binary codes, and what it costs."""

from hcx.compress.bcq import quantize
from hcx.compress.calibration import InputStatistics, collect
from hcx.compress.divergence import Divergence, divergence, divergence_by_language
from hcx.compress.feedback import quantize_to_outputs
from hcx.compress.nested import quantize_nested
from hcx.compress.plan import Calibration, CompressPlan, ModulePlan, PlanRule
from hcx.compress.preview import PreviewRow
from hcx.compress.run import CompressionSummary, compress_model, plan_rows
from hcx.compress.uniform import from_uniform, quantize_uniform, search_uniform

__all__ = [
    "Calibration",
    "CompressPlan",
    "CompressionSummary",
    "Divergence",
    "InputStatistics",
    "ModulePlan",
    "PlanRule",
    "PreviewRow",
    "collect",
    "compress_model",
    "divergence",
    "divergence_by_language",
    "from_uniform",
    "plan_rows",
    "quantize",
    "quantize_nested",
    "quantize_to_outputs",
    "quantize_uniform",
    "search_uniform",
]
