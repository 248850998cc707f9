"""A `transformers` model of the same shape, for side-by-side measurements and parity."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


def transformers_decoding(config: ModelConfig, dtype: torch.dtype, prompt: Tensor) -> Callable[[], Tensor]:
    """A greedy decoding loop over such a model: reads the prompt `[1, seq]`, and makes one token per call.

    Raises:
        MissingExtra: transformers is not installed.
    """
    model = transformers_model(config, dtype).eval()
    from transformers import DynamicCache

    # The argument was renamed within the releases that hcx supports.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    arguments = {name: DynamicCache(config=model.config), "use_cache": True}
    state = {"tokens": prompt}

    @torch.inference_mode()
    def step() -> Tensor:
        logits: Tensor = model(input_ids=state["tokens"], **arguments).logits[:, -1]
        state["tokens"] = logits.argmax(-1, keepdim=True)
        return logits

    step()
    return step


def transformers_version() -> str:
    """The installed version."""
    import transformers

    return str(transformers.__version__)
