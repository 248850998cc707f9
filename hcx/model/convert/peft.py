"""Adapter directories in PEFT's form: `adapter_config.json` and `adapter_model.safetensors`, without importing peft.

Options that `LoRASource` does not compute are refused by name: an adapter that is half applied looks right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hcx.artifacts.tensors import write_safetensors
from hcx.errors import CheckpointError
from hcx.model.adapters import Adapter
from hcx.model.convert.hf import write_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""PEFT wraps the model twice: its own module, and the tuner's."""
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
)


def read_adapter(directory: str | Path) -> Adapter:
    """Reads an adapter that PEFT or hcx wrote.

    Raises:
        CheckpointError: a file is missing or damaged, it is another method than LoRA, or it uses an option that is not
            supported.
    """
    directory = Path(directory)
    stated = _read_config(directory)
    kind = stated.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{directory}: peft_type = {kind!r} is not supported; supported: 'LORA'")
    used = [name for name in _UNSUPPORTED if stated.get(name)]
    if stated.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG}: {used[0]} = {stated[used[0]]!r} is not supported; merge the adapter into "
            "its model with peft (merge_and_unload) and give the merged model"
        )
    try:
        rank, alpha = int(stated["r"]), float(stated["lora_alpha"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{directory / ADAPTER_CONFIG}: r and lora_alpha must be numbers") from None
    if stated.get("use_rslora"):
        alpha *= rank**0.5  # scaled by alpha / sqrt(rank) (Kalajdzievski 2023), which ours is of this alpha
    tensors = _read_tensors(directory)
    _check_shapes(directory, rank, tensors)
    targets = stated.get("target_modules")
    names = tuple(targets) if isinstance(targets, list) else tuple({n.split(".")[-3] for n in tensors})
    return Adapter(rank, alpha, tuple(sorted(names)), tensors, directory)


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such adapter directory")
    try:
        stated = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{directory}: not an adapter directory, {ADAPTER_CONFIG} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{directory / ADAPTER_CONFIG}: not JSON ({error})") from None
    if not isinstance(stated, dict):
        raise CheckpointError(f"{directory / ADAPTER_CONFIG}: must hold a JSON object")
    return stated


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = (directory / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{directory}: {ADAPTER_WEIGHTS} is missing"
            + (" (a pickled adapter_model.bin is never loaded: save it as safetensors with peft)" if pickled else "")
        )
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error})") from None
    tensors = {}
    for name, tensor in stored.items():
        canonical = name.removeprefix(_PREFIX)
        if not canonical.endswith((".lora_A.weight", ".lora_B.weight")):
            raise CheckpointError(f"{path}: {name} is no low-rank update of a linear; such adapters are not supported")
        tensors[canonical] = tensor
    return tensors


def _check_shapes(directory: Path, rank: int, tensors: Mapping[str, Tensor]) -> None:
    if not tensors:
        raise CheckpointError(f"{directory / ADAPTER_WEIGHTS}: holds no updates")
    for name, tensor in tensors.items():
        stem, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        other = f"{stem}.lora_{'B' if factor == 'A' else 'A'}.weight"
        if other not in tensors:
            raise CheckpointError(f"{directory / ADAPTER_WEIGHTS}: {name} is there, {other} is missing")
        stated = tensor.shape[0 if factor == "A" else 1]
        if tensor.dim() != 2 or stated != rank:
            raise CheckpointError(
                f"{directory / ADAPTER_WEIGHTS}: {name} is {tuple(tensor.shape)}, but r = {rank} in {ADAPTER_CONFIG}"
            )


def write_adapter(directory: str | Path, adapter: Adapter, base: str, dtype: torch.dtype = torch.float32) -> None:
    """Fills a directory that `peft.PeftModel.from_pretrained(base, DIRECTORY)` loads.

    Args:
        directory: exists; files are added.
        adapter: the updates.
        base: directory or name of the model below, for people and for PEFT's automatic loading.
        dtype: of the written tensors.
    """
    directory = Path(directory)
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    write_json(
        directory / ADAPTER_CONFIG,
        {
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": adapter.rank,
            "target_modules": list(adapter.targets),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        },
    )
    write_safetensors(
        directory / ADAPTER_WEIGHTS,
        {f"{_PREFIX}{name}": tensor.to(dtype).cpu().contiguous() for name, tensor in sorted(adapter.tensors.items())},
        metadata={"format": "pt"},
    )
