"""What a served model is: its precision, the numerics of its kernels, and its context."""

from __future__ import annotations

from typing import Any

from hcx.kernels.registry import NUMERICS, backends
from hcx.model.load import LoadedModel
from hcx.model.parts.sources import BCQSource


def describe_model(loaded: LoadedModel, max_seq: int) -> dict[str, Any]:
    """Fields of `/v1/models` beyond OpenAI's.

    `numerics` is the class that the kernels keep (`reference`, `exact` or `fast`); `full` for a model without
    binary-coded weights. `bits` is bits per weight of the coded matrices, or of the dense type. `adapter` names the
    directory of low-rank updates beside the weights.
    """
    weight = loaded.decoder.output_weight()
    dense = str(weight.dtype).removeprefix("torch.")
    described: dict[str, Any] = {
        "max_model_len": max_seq,
        "architecture": loaded.config.architecture,
        "dtype": dense,
        "device": str(weight.device),
        "tokenizer_digest": None if loaded.tokenizer is None else loaded.tokenizer.digest,
        "adapter": None if loaded.adapter is None else loaded.adapter.resolve().name,
    }
    if loaded.quantization is None:
        return {**described, "numerics": "full", "bits": weight.element_size() * 8, "quantization": None, "kernels": []}
    kernels = sorted(
        {name for module in loaded.decoder.modules() if isinstance(module, BCQSource) for name in module.kernels}
    )
    kept = {backend.name: backend.numerics for backend in backends()}
    return {
        **described,
        # Kernels are never below what was asked for, but may be above it: the lowest one is what the answers have.
        "numerics": min((kept[name] for name in kernels), key=NUMERICS.index, default=loaded.numerics),
        "numerics_requested": loaded.numerics,
        "bits": loaded.quantization.get("bits"),
        "quantization": loaded.quantization.get("quant_method"),
        "kernels": kernels,
    }
