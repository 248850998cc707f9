"""The one decoder, its parts and weight sources, loading and conversion.

`ModelConfig` needs no torch, so that plans and checks of recipes answer at once; the other names import it when asked.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hcx.model.config import ModelConfig

if TYPE_CHECKING:
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

_MODULE_OF = {
    "Decoder": "decoder",
    "ForwardMeta": "meta",
    "InitWeights": "weights",
    "Parts": "parts.base",
    "PlainParts": "parts.base",
    "TensorWeights": "weights",
    "WeightsProvider": "weights",
    "load_weights": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
