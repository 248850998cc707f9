"""A `transformers` model of the same shape, for side-by-side measurements and parity."""

from __future__ import annotations

from typing import Any

import torch

from hcx.errors import MissingExtra
from hcx.model.config import ModelConfig
from hcx.model.convert.hf import config_to_hf


def transformers_model(config: ModelConfig, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    """A randomly initialised causal language model of `transformers` with this configuration.

    Raises:
        MissingExtra: transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "transformers", "a comparison with transformers") from None
    values = config_to_hf(config)
    values.pop("architectures")
    hf_config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    hf_config.use_cache = False
    return transformers.AutoModelForCausalLM.from_config(hf_config, attn_implementation=attention, dtype=dtype)


def transformers_version() -> str:
    """The installed version."""
    import transformers

    return str(transformers.__version__)
