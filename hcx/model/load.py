"""Any MODEL -> a decoder: Hugging Face's llama and hyperclovax files, full precision or binary-coded, and GGUF."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hcx.artifacts import artifact_input, is_complete, read_manifest
from hcx.errors import CheckpointError
from hcx.model.adapters import attach_adapter
from hcx.model.config import ModelConfig
from hcx.model.convert.gguf_file import is_gguf
from hcx.model.convert.peft import read_adapter
from hcx.model.decoder import Decoder
from hcx.model.files import QUANT_METHOD, ModelFiles, tokenizer_of
from hcx.model.parts.base import PlainParts
from hcx.model.parts.linear import LinearPart
from hcx.model.parts.sources import BCQSource, DenseSource, LinearBlock, SplitSource, WeightSource
from hcx.model.weights import TensorWeights, load_weights
from hcx.obs import get_logger

if TYPE_CHECKING:
    from hcx.tokenizer import Tokenizer

__all__ = [
    "QUANT_METHOD",
    "LoadedModel",
    "ModelFiles",
    "canonical_names",
    "iter_tensors",
    "load_model",
    "tensor_names",
    "use_packed",
]

log = get_logger(__name__)


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
    """

    decoder: Decoder
    config: ModelConfig
    tokenizer: Tokenizer | None
    directory: Path
    quantization: dict[str, Any] | None
    numerics: str = "reference"
    adapter: Path | None = None
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
) -> LoadedModel:
    """Loads a model for inference.

    Args:
        directory: Hugging Face's layout, full precision or BCQ; or a GGUF file.
        dtype: of dense weights and activations; fp32 on a CPU and the stored type on a GPU if not given.
        device: where to compute.
        numerics: class of the kernels for binary-coded weights: `reference`, `exact` or `fast`.
        adapter: a directory of low-rank updates in PEFT's form, computed beside the model's weights.

    Raises:
        CheckpointError: the directory is no model, is damaged, or needs something that is not supported.
    """
    device = torch.device(device)
    with ModelFiles(directory) as files:
        if dtype is None:
            stored = str(files.values.get("dtype") or files.values.get("torch_dtype") or "float32")
            dtype = torch.float32 if device.type == "cpu" else getattr(torch, stored.removeprefix("torch."))
        decoder = Decoder(files.config, PlainParts(dtype, "meta"))

        def dense(block: LinearBlock) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(block.global_shape, dtype=dtype, device="meta"))

        for part in dict.fromkeys(decoder.linears().values()):
            use_packed(part, files, device, numerics, dense)
        decoder.to_empty(device=device)
        load_weights(decoder, decoder.parameter_map(), TensorWeights(files.weight, str(files.directory)))
        quantization = files.values.get("quantization_config")
        tokenizer = files.tokenizer()
    if adapter is not None:
        adapter = Path(adapter)
        attach_adapter(decoder, read_adapter(adapter), dtype, device)
        tokenizer = _adapted_tokenizer(adapter, tokenizer)
        _tell_other_base(adapter, files.directory)
    decoder.requires_grad_(False).eval()
    return LoadedModel(decoder, files.config, tokenizer, files.directory, quantization or None, numerics, adapter)


def use_packed(
    part: LinearPart,
    files: ModelFiles,
    device: torch.device,
    numerics: str,
    dense: Callable[[LinearBlock], torch.nn.Parameter],
    differentiable: bool = False,
) -> None:
    """Lets a linear part multiply with the directory's binary-coded weights, where it has some for it.

    Args:
        part: holds whole matrices (no tensor parallelism).
        files: the model directory.
        device: where to compute.
        numerics: class of the kernels.
        dense: makes the parameter of a block that is not binary-coded, in a part where others are.
        differentiable: gradients shall flow through to what comes before the part.

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
    if len(quantized) == len(part.blocks):
        part.replace_source(BCQSource(packed, numerics, differentiable))
        return
    sources: dict[str, WeightSource] = {}
    for block in part.blocks:
        if block.stem in packed:
            sources[block.stem] = BCQSource({block.stem: packed[block.stem]}, numerics, differentiable)
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
    adapted = tokenizer_of(directory)
    if adapted is None or base is None:
        return adapted or base
    if adapted.digest != base.digest:
        raise CheckpointError(
            f"{directory}: the adapter was trained with another tokenizer.json (digest {adapted.digest[:12]}) than the "
            f"model's ({base.digest[:12]}); give the model that it was trained on"
        )
    return adapted
