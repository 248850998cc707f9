"""Where the stored tensors of a MODEL come from: safetensors files, or a GGUF file (`hcx.model.convert.gguf`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hcx.errors import CheckpointError
from hcx.model.config import ModelConfig


class TensorStore(Protocol):
    """Where stored tensors come from: safetensors files or a GGUF file."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name of every stored tensor -> its shape, known without reading it."""
        ...

    def read(self, name: str) -> Tensor:
        """One stored tensor."""
        ...

    def close(self) -> None:
        """Releases the files."""
        ...


class SafetensorsStore:
    """The safetensors files of a directory. One is open only while a tensor of it is alive.

    What is mapped counts as memory of the process until it is released: a model larger than the memory is walked
    through tensor by tensor.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        files = sorted(path.name for path in directory.glob("*.safetensors"))
        if not files:
            pickled = any(directory.glob("*.bin"))
            raise CheckpointError(
                f"{directory}: no *.safetensors"
                + (" (pickled *.bin files are never loaded: save them as safetensors first)" if pickled else "")
            )
        for path in directory.glob("*.safetensors.index.json"):
            for name in sorted(set(_weight_map(path).values())):
                if name not in files:
                    raise CheckpointError(f"{directory / name}: listed in {path.name} but missing")
        self._where: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file_name in files:
            with self._open(file_name) as file:
                for name in file.keys():  # noqa: SIM118
                    self._where[name] = file_name
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def _open(self, file_name: str) -> Any:
        try:
            return safe_open(self._directory / file_name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._directory / file_name}: damaged or cut short ({error})") from None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name of every stored tensor -> its shape."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """One stored tensor."""
        with self._open(self._where[name]) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except (SafetensorError, AttributeError) as error:
                raise CheckpointError(
                    f"{self._directory / self._where[name]}: {name} cannot be read ({error})"
                ) from None
        return tensor

    def close(self) -> None:
        """Nothing stays open."""


def check_sizes(
    source: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], modules: Mapping[str, Mapping[str, Any]]
) -> None:
    """Compares the sizes that decide how much is built with what is stored, before anything is built.

    Raises:
        CheckpointError: the configuration is of another model, or hostile.
    """
    wanted = {
        "model.embed_tokens": (config.vocab_size, config.hidden_size),
        "model.layers.0.self_attn.q_proj": (config.num_heads * config.head_size, config.hidden_size),
        "model.layers.0.mlp.gate_proj": (config.intermediate_size, config.hidden_size),
    }
    for stem, shape in wanted.items():
        name = f"{stem}.weight"
        if name in shapes and shapes[name] != shape:
            raise CheckpointError(f"{source}: {name} has shape {shapes[name]}, the configuration says {shape}")
        entry = modules.get(stem)
        if entry is not None and (entry.get("out_features"), entry.get("in_features")) != shape:
            raise CheckpointError(
                f"{source}: quantization_config.modules.{stem} is {entry.get('out_features')} x "
                f"{entry.get('in_features')}, the configuration says {shape}"
            )
        if name not in shapes and entry is None:
            raise CheckpointError(f"{source}: the weight files lack {name!r}: incomplete, or not of this config.json")
    if config.num_layers > len(shapes):
        raise CheckpointError(
            f"{source}: num_hidden_layers = {config.num_layers}, and only {len(shapes)} tensors are stored"
        )


def _weight_map(path: Path) -> dict[str, str]:
    stated = read_json(path).get("weight_map")
    if not isinstance(stated, dict) or not all(isinstance(name, str) for name in stated.values()):
        raise CheckpointError(f"{path}: no weight_map of tensor names to file names")
    return stated


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model directory.

    Raises:
        CheckpointError: missing, or no JSON object.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: not a model directory, {path.name} is missing") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return values
