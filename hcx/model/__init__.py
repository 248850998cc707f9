"""The one decoder, its parts and weight sources, loading and conversion."""

from hcx.model.config import ModelConfig
from hcx.model.decoder import Decoder
from hcx.model.meta import ForwardMeta
from hcx.model.parts.base import Parts, PlainParts
from hcx.model.weights import InitWeights, TensorWeights, WeightsProvider, load_weights

__all__ = [
    "Decoder",
    "ForwardMeta",
    "InitWeights",
    "ModelConfig",
    "Parts",
    "PlainParts",
    "TensorWeights",
    "WeightsProvider",
    "load_weights",
]
