"""Compression of trained weights to binary codes, and what it costs."""

from hcx.compress.bcq import quantize
from hcx.compress.plan import CompressPlan, ModulePlan, PlanRule
from hcx.compress.run import CompressionSummary, compress_model
from hcx.compress.uniform import quantize_uniform

__all__ = [
    "CompressPlan",
    "CompressionSummary",
    "ModulePlan",
    "PlanRule",
    "compress_model",
    "quantize",
    "quantize_uniform",
]
