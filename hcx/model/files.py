"""Random access to the stored tensors of any MODEL: safetensors, full precision or binary-coded, and GGUF."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hcx.artifacts import is_complete, read_manifest
from hcx.errors import CheckpointError, KernelError
from hcx.kernels import PackedWeight
from hcx.model.convert.gguf import GGUFModel, check_tokenizer
from hcx.model.convert.gguf_file import SUFFIX, is_gguf
from hcx.model.convert.hf import config_from_hf, copy_tokenizer

if TYPE_CHECKING:
    from hcx.tokenizer import Tokenizer

QUANT_METHOD = "bcq"


class _Store(Protocol):
    """Where stored tensors come from: safetensors files or a GGUF file."""

    def names(self) -> list[str]:
        """Names of the stored tensors."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a stored tensor, without reading it."""
        ...

    def read(self, name: str) -> Tensor:
        """One stored tensor."""
        ...

    def close(self) -> None:
        """Releases the files."""
        ...


class _SafetensorsStore:
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

    def names(self) -> list[str]:
        return list(self._where)

    def has(self, name: str) -> bool:
        return name in self._where

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
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


class ModelFiles:
    """Random access to the tensors of a MODEL, a directory or a GGUF file; nothing is unpickled.

    Attributes:
        directory: the directory, or the GGUF file.
        values: `config.json`, or what it would say.
        config: the decoder's configuration.
        modules: stem -> entry of `quantization_config.modules`; empty for full precision.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._gguf: GGUFModel | None = None
        self._store: _Store
        if is_gguf(self.directory):
            self._gguf = self._store = GGUFModel(self.directory)
            self.values = self._gguf.values
            self.config = config_from_hf(self.values, str(self.directory))
        else:
            if not self.directory.is_dir():
                raise CheckpointError(
                    f"{directory}: no such model directory, nor a GGUF file (they are told by the ending {SUFFIX})"
                )
            self.values = _read_json(self.directory / "config.json")
            self.config = config_from_hf(self.values, str(self.directory / "config.json"))
            self._store = _SafetensorsStore(self.directory)
        self.modules = self._quantized_modules()
        self._check_sizes()

    def _quantized_modules(self) -> Mapping[str, Mapping[str, Any]]:
        stated = self.values.get("quantization_config")
        if not stated:
            return {}
        if not isinstance(stated, dict):
            raise CheckpointError(f"{self.directory}: quantization_config must be an object")
        method = stated.get("quant_method")
        if method != QUANT_METHOD:
            raise CheckpointError(
                f"{self.directory}: quant_method = {method!r} is not supported; supported: {QUANT_METHOD!r}, "
                "or full precision"
            )
        if stated.get("version") != 1:
            raise CheckpointError(f"{self.directory}: BCQ format version {stated.get('version')}; this hcx reads 1")
        modules: Mapping[str, Mapping[str, Any]] = stated.get("modules", {})
        if not isinstance(modules, dict) or not all(isinstance(entry, dict) for entry in modules.values()):
            raise CheckpointError(f"{self.directory}: quantization_config.modules must map names to settings")
        return modules

    def _check_sizes(self) -> None:
        """Compares the sizes that decide how much is built with what is stored, before anything is built.

        Raises:
            CheckpointError: the configuration is of another model, or hostile.
        """
        config, names = self.config, set(self._store.names())
        wanted = {
            "model.embed_tokens": (config.vocab_size, config.hidden_size),
            "model.layers.0.self_attn.q_proj": (config.num_heads * config.head_size, config.hidden_size),
            "model.layers.0.mlp.gate_proj": (config.intermediate_size, config.hidden_size),
        }
        for stem, shape in wanted.items():
            name = f"{stem}.weight"
            if name in names and self._store.shape(name) != shape:
                raise CheckpointError(
                    f"{self.directory}: {name} has shape {self._store.shape(name)}, the configuration says {shape}"
                )
            entry = self.modules.get(stem)
            if entry is not None and (entry.get("out_features"), entry.get("in_features")) != shape:
                raise CheckpointError(
                    f"{self.directory}: quantization_config.modules.{stem} is {entry.get('out_features')} x "
                    f"{entry.get('in_features')}, the configuration says {shape}"
                )
            if name not in names and entry is None:
                raise CheckpointError(
                    f"{self.directory}: the weight files lack {name!r}: incomplete, or not of this config.json"
                )
        if config.num_layers > len(names):
            raise CheckpointError(
                f"{self.directory}: num_hidden_layers = {config.num_layers}, and only {len(names)} tensors are stored"
            )

    @property
    def is_file(self) -> bool:
        """Whether it is a GGUF file, whose tokenizer lies in its metadata."""
        return self._gguf is not None

    def names(self) -> list[str]:
        """Names of the stored tensors."""
        return self._store.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a dense weight, without reading it.

        Raises:
            CheckpointError: there is none of that name.
        """
        self._check_name(name)
        return self._store.shape(name)

    def read(self, name: str) -> Tensor:
        """One stored tensor, in its stored type.

        Raises:
            CheckpointError: there is none of that name.
        """
        self._check_name(name)
        return self._store.read(name)

    def _check_name(self, name: str) -> None:
        if not self._store.has(name):
            raise CheckpointError(
                f"{self.directory}: the weight files lack {name!r}: incomplete, or not of this config.json"
            )

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or None if it has none.

        Raises:
            DataError: damaged, or of a kind that is not read.
            CheckpointError: not the one that the model was trained with.
        """
        if self._gguf is None:
            return tokenizer_of(self.directory)
        found = self._gguf.tokenizer()
        check_tokenizer(found, self.config.vocab_size, self.directory)
        return found

    def write_tokenizer(self, directory: Path) -> bool:
        """Puts the model's tokenizer files into a directory; says whether there were any."""
        if self._gguf is None:
            copy_tokenizer(self.directory, directory)
        else:
            found = self.tokenizer()
            if found is not None:
                found.save(directory)
        return (directory / "tokenizer.json").is_file()

    def packed(self, stem: str) -> PackedWeight:
        """One binary-coded weight."""
        entry = self.modules[stem]
        stored = (f"{stem}.planes", f"{stem}.scales", f"{stem}.offset")
        names = [name for name in stored if self._store.has(name)]
        try:
            return PackedWeight.from_tensors(stem, {name: self.read(name) for name in names}, entry)
        except KernelError as error:
            raise CheckpointError(f"{self.directory}: {error}") from None

    def weight(self, name: str) -> Tensor:
        """A dense weight by canonical name; a binary-coded one is dequantized."""
        stem = name.removesuffix(".weight")
        return self.packed(stem).dequantize() if stem in self.modules else self.read(name)

    def close(self) -> None:
        """Releases the files."""
        self._store.close()

    def __enter__(self) -> ModelFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _weight_map(path: Path) -> dict[str, str]:
    stated = _read_json(path).get("weight_map")
    if not isinstance(stated, dict) or not all(isinstance(name, str) for name in stated.values()):
        raise CheckpointError(f"{path}: no weight_map of tensor names to file names")
    return stated


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: not a model directory, {path.name} is missing") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return values


def tokenizer_of(directory: Path) -> Tokenizer | None:
    """The tokenizer in a directory, or None if it holds none.

    Raises:
        CheckpointError: not the one that the manifest names.
        DataError: damaged.
    """
    if not (directory / "tokenizer.json").is_file():
        return None
    from hcx.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(directory)
    if is_complete(directory):
        stated = read_manifest(directory).counts.get("tokenizer_digest")
        if stated and stated != tokenizer.digest:
            raise CheckpointError(
                f"{directory}: tokenizer.json (digest {tokenizer.digest[:12]}) is not the one this model was trained "
                f"with ({str(stated)[:12]}); restore the original file"
            )
    return tokenizer
