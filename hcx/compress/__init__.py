"""Compression of trained weights to binary codes, and what it costs."""

from hcx.compress.bcq import quantize
from hcx.compress.divergence import Divergence, divergence, divergence_by_language
from hcx.compress.plan import CompressPlan, ModulePlan, PlanRule
from hcx.compress.preview import PreviewRow
from hcx.compress.run import CompressionSummary, compress_model, plan_rows
from hcx.compress.uniform import from_uniform, quantize_uniform

__all__ = [
    "CompressPlan",
    "CompressionSummary",
    "Divergence",
    "ModulePlan",
    "PlanRule",
    "PreviewRow",
    "compress_model",
    "divergence",
    "divergence_by_language",
    "from_uniform",
    "plan_rows",
    "quantize",
    "quantize_uniform",
]
