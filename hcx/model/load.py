"""Any MODEL -> a decoder: Hugging Face's llama and hyperclovax files, full precision or binary-coded, and GGUF."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hcx.artifacts import artifact_input, is_complete, read_manifest
from hcx.errors import CheckpointError, KernelError
from hcx.kernels import PackedWeight, xor_codes
from hcx.model.adapters import attach_adapter
from hcx.model.config import ModelConfig
from hcx.model.convert.gguf import GGUFModel, check_tokenizer
from hcx.model.convert.gguf_file import SUFFIX, is_gguf
from hcx.model.convert.hf import config_from_hf, copy_tokenizer
from hcx.model.convert.peft import read_adapter
from hcx.model.decoder import Decoder
from hcx.model.parts.base import PlainParts
from hcx.model.parts.linear import LinearPart
from hcx.model.parts.scales import RoutedSource
from hcx.model.parts.sources import BCQSource, DenseSource, LinearBlock, SplitSource, WeightSource
from hcx.model.stores import SafetensorsStore, TensorStore, check_sizes, read_json
from hcx.model.tasks import ScaleTask, is_task, read_task
from hcx.model.weights import TensorWeights, load_weights
from hcx.obs import get_logger

if TYPE_CHECKING:
    from hcx.tokenizer import Tokenizer

log = get_logger(__name__)

QUANT_METHOD = "bcq"


class ModelFiles:
    """Random access to the tensors of a MODEL, a directory or a GGUF file; nothing is unpickled.

    Attributes:
        directory: the directory, or the GGUF file.
        values: `config.json`, or what it would say.
        config: the decoder's configuration.
        modules: stem -> entry of `quantization_config.modules`; empty for full precision.
        bits: the width at which weights that have several are read; the widest if None.

    Raises:
        CheckpointError: the directory is no model, is damaged, or has no such width.
    """

    def __init__(self, directory: str | Path, bits: int | None = None) -> None:
        self.directory = Path(directory)
        self._gguf = GGUFModel(self.directory) if is_gguf(self.directory) else None
        if self._gguf is None and not self.directory.is_dir():
            raise CheckpointError(
                f"{directory}: no such model directory, nor a GGUF file (they are told by the ending {SUFFIX})"
            )
        self.values = self._gguf.values if self._gguf is not None else read_json(self.directory / "config.json")
        self.config = config_from_hf(self.values, str(self.directory / "config.json"))
        self.modules = self._quantized_modules()
        self.bits = bits
        if bits is not None and not any(bits in self._widths(entry) for entry in self.modules.values()):
            there = sorted({width for entry in self.modules.values() for width in self._widths(entry)})
            raise CheckpointError(
                f"{self.directory}: no weights of {bits} bits; "
                + (f"this model is served at {', '.join(map(str, there))}" if there else "it is not binary-coded")
            )
        self._store: TensorStore = self._gguf if self._gguf is not None else SafetensorsStore(self.directory)
        self._where = self._store.shapes
        check_sizes(self.directory, self.config, self._where, self.modules)

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

    @staticmethod
    def _widths(entry: Mapping[str, Any]) -> list[int]:
        return list(entry.get("widths") or [entry.get("bits")])

    def names(self) -> list[str]:
        """Names of the stored tensors."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor, without reading it.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name not in self._where:
            raise CheckpointError(
                f"{self.directory}: the weight files lack {name!r}: incomplete, or not of this config.json"
            )
        return self._where[name]

    def read(self, name: str) -> Tensor:
        """One stored tensor, in its stored type.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name not in self._where:
            raise CheckpointError(
                f"{self.directory}: the weight files lack {name!r}: incomplete, or not of this config.json"
            )
        return self._store.read(name)

    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, or None if it has none.

        Raises:
            DataError: damaged, or of a kind that is not read.
            CheckpointError: not the one that the model was trained with.
        """
        if self._gguf is None:
            return _tokenizer(self.directory)
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
        """One binary-coded weight, at the width asked for if it has several."""
        entry = self.modules[stem]
        names = [name for name in self._where if name.rpartition(".")[0] == stem]
        try:
            tensors = {name: self.read(name) for name in names}
            if entry.get("encoding", {}).get("kind") == xor_codes.KIND:
                tensors[f"{stem}.planes"] = xor_codes.decode_planes(stem, self.read(f"{stem}.codes"), entry)
                entry = {key: value for key, value in entry.items() if key != "encoding"}
            packed = PackedWeight.from_tensors(stem, tensors, entry)
            # A weight of one width, or without this one (a rule of the plan), is served as it is.
            return packed.at(self.bits if self.bits in packed.narrow and self.bits is not None else packed.bits)
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


@dataclass
class LoadedModel:
    """A model ready to compute.

    Attributes:
        decoder: in evaluation mode, without gradients.
        config: its shape.
        tokenizer: of the directory, or None if it holds none.
        directory: where it came from; a GGUF file stands for itself.
        quantization: `quantization_config` of a binary-coded model, or None.
        numerics: the class that its kernels keep.
        adapter: the directory of the low-rank updates beside its weights, or None.
        tasks: names of the tasks whose scales rows may ask for; the first one is number 1 (`ForwardMeta.adapter_ids`).
    """

    decoder: Decoder
    config: ModelConfig
    tokenizer: Tokenizer | None
    directory: Path
    quantization: dict[str, Any] | None
    numerics: str = "reference"
    adapter: Path | None = None
    tasks: tuple[str, ...] = ()
    _unpacked: TemporaryDirectory[str] | None = field(default=None, init=False, repr=False)

    @property
    def tokenizer_directory(self) -> Path:
        """Where the tokenizer's files are: an adapter's chat format may differ from its model's.

        Of a GGUF file they are unpacked into a temporary directory, which lives as long as this object.
        """
        if self.adapter is not None and (self.adapter / "tokenizer.json").is_file():
            return self.adapter
        if not is_gguf(self.directory) or self.tokenizer is None:
            return self.directory
        if self._unpacked is None:
            self._unpacked = TemporaryDirectory(prefix="hcx-tokenizer-")
            self.tokenizer.save(self._unpacked.name)
        return Path(self._unpacked.name)


def iter_tensors(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Streams (canonical name, tensor) of a MODEL directory; binary-coded weights come dequantized, in fp32."""
    with ModelFiles(directory) as files:
        for name in canonical_names(files):
            yield name, files.weight(name)


def canonical_names(files: ModelFiles) -> list[str]:
    """The names a directory's decoder needs, in file order of a fresh export."""
    return tensor_names(files.config)


def tensor_names(config: ModelConfig) -> list[str]:
    """Canonical names of every parameter of a model."""
    decoder = Decoder(config, PlainParts(device="meta"))
    return [block.name for blocks in decoder.parameter_map().values() for block in blocks]


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    numerics: str = "reference",
    adapter: str | Path | None = None,
    bits: int | None = None,
    tasks: Mapping[str, str | Path] | None = None,
) -> LoadedModel:
    """Loads a model for inference.

    Args:
        directory: Hugging Face's layout, full precision or BCQ; or a GGUF file.
        dtype: of dense weights and activations; fp32 on a CPU and the stored type on a GPU if not given.
        device: where to compute.
        numerics: class of the kernels for binary-coded weights: `reference`, `exact` or `fast`. Below `reference` a
            binary-coded output matrix is multiplied by a kernel too; rows of an embedding are always dequantized.
        adapter: a directory of low-rank updates in PEFT's form, computed beside the model's weights; or of a task's
            scales, which take the place of the model's.
        bits: the width of a model with nested planes; the widest if not given.
        tasks: name -> directory of a task's scales, for rows that ask for them.

    Raises:
        CheckpointError: the directory is no model, is damaged, or needs something that is not supported.
    """
    device = torch.device(device)
    with ModelFiles(directory, bits) as files:
        if dtype is None:
            stored = str(files.values.get("dtype") or files.values.get("torch_dtype") or "float32")
            dtype = torch.float32 if device.type == "cpu" else getattr(torch, stored.removeprefix("torch."))
        decoder = Decoder(files.config, PlainParts(dtype, "meta"))
        merged = read_task(adapter) if adapter is not None and is_task(adapter) else None
        routed = [read_task(path) for path in (tasks or {}).values()]
        for task in (*([merged] if merged else []), *routed):
            _check_task(task, files)

        def dense(block: LinearBlock) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(block.global_shape, dtype=dtype, device="meta"))

        for part in dict.fromkeys(decoder.linears().values()):
            use_packed(part, files, device, numerics, dense, merged=merged, tasks=routed)
        decoder.to_empty(device=device)
        load_weights(decoder, decoder.parameter_map(), TensorWeights(files.weight, str(files.directory)))
        output = "model.embed_tokens" if files.config.tie_embeddings else "lm_head"
        if output in files.modules and numerics != "reference":
            decoder.output_source = BCQSource({output: files.packed(output).to(device)}, numerics)
        quantization = files.values.get("quantization_config")
        tokenizer = files.tokenizer()
    if adapter is not None:
        adapter = Path(adapter)
        if merged is None:
            attach_adapter(decoder, read_adapter(adapter), dtype, device)
        tokenizer = _adapted_tokenizer(adapter, tokenizer)
        _tell_other_base(adapter, files.directory)
    decoder.requires_grad_(False).eval()
    return LoadedModel(
        decoder, files.config, tokenizer, files.directory, quantization or None, numerics, adapter, tuple(tasks or ())
    )


def _check_task(task: ScaleTask, files: ModelFiles) -> None:
    foreign = sorted(task.stems - set(files.modules))
    if foreign:
        raise CheckpointError(
            f"{task.directory}: holds scales of {foreign[0]}, which is not binary-coded in {files.directory}; give the "
            f"model that the task was trained on ({task.base})"
        )


def use_packed(
    part: LinearPart,
    files: ModelFiles,
    device: torch.device,
    numerics: str,
    dense: Callable[[LinearBlock], torch.nn.Parameter],
    differentiable: bool = False,
    merged: ScaleTask | None = None,
    tasks: Sequence[ScaleTask] = (),
) -> None:
    """Lets a linear part multiply with the directory's binary-coded weights, where it has some for it.

    Args:
        part: holds whole matrices (no tensor parallelism).
        files: the model directory.
        device: where to compute.
        numerics: class of the kernels.
        dense: makes the parameter of a block that is not binary-coded, in a part where others are.
        differentiable: gradients shall flow through to what comes before the part.
        merged: a task whose scales take the place of the directory's.
        tasks: tasks that rows of a batch may ask for.

    Raises:
        CheckpointError: a packed weight has another shape than the part.
    """
    quantized = [block for block in part.blocks if block.stem in files.modules]
    if not quantized:
        return
    packed = {block.stem: files.packed(block.stem).to(device) for block in quantized}
    for block in quantized:
        shape = (packed[block.stem].out_features, packed[block.stem].in_features)
        if shape != block.global_shape:
            raise CheckpointError(
                f"{files.directory}: {block.stem} is {shape}, the configuration says {block.global_shape}"
            )
    if merged is not None:
        packed = {stem: merged.merged(stem, weight) for stem, weight in packed.items()}

    def coded(chosen: dict[str, PackedWeight]) -> WeightSource:
        source = BCQSource(chosen, numerics, differentiable)
        if not tasks:
            return source
        versions = [[task.merged(stem, weight) for stem, weight in chosen.items()] for task in tasks]
        return RoutedSource(source, list(chosen.values()), versions)

    if len(quantized) == len(part.blocks):
        part.replace_source(coded(packed))
        return
    sources: dict[str, WeightSource] = {}
    for block in part.blocks:
        if block.stem in packed:
            sources[block.stem] = coded({block.stem: packed[block.stem]})
        else:
            sources[block.stem] = DenseSource(dense(block), [block.alone()])
    part.replace_source(SplitSource(sources))


def _tell_other_base(adapter: Path, directory: Path) -> None:
    """An adapter may go on a compressed copy of its model; that it does is worth a word."""
    if not (is_complete(adapter) and is_complete(directory)):
        return
    made_on = [item for item in read_manifest(adapter).inputs if item.role == "model"]
    if made_on and made_on[0].digest != artifact_input("model", directory).digest:
        log.warning("%s was trained on %s, which is another model than %s", adapter, made_on[0].path, directory)


def _adapted_tokenizer(directory: Path, base: Tokenizer | None) -> Tokenizer | None:
    """The adapter's own tokenizer files, whose chat format may differ from the model's; its ids may not."""
    adapted = _tokenizer(directory)
    if adapted is None or base is None:
        return adapted or base
    if adapted.digest != base.digest:
        raise CheckpointError(
            f"{directory}: the adapter was trained with another tokenizer.json (digest {adapted.digest[:12]}) than the "
            f"model's ({base.digest[:12]}); give the model that it was trained on"
        )
    return adapted


def _tokenizer(directory: Path) -> Tokenizer | None:
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
