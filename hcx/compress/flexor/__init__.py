"""FleXOR: trainable fractional-bit quantization with networks of XOR gates (Lee et al., NeurIPS 2020)."""

from hcx.compress.flexor.config import FlexorConfig, check_flexor
from hcx.compress.flexor.source import FlexorSource
from hcx.compress.flexor.transform import Flexor, packed_of

__all__ = ["Flexor", "FlexorConfig", "FlexorSource", "check_flexor", "packed_of"]
