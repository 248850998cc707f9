"""Teaches `transformers` the binary-coded format, so that `from_pretrained` loads a BCQ directory.

`register()` acts at once if transformers is loaded, else when it is imported first. Without it a stock
`from_pretrained` stops with an error, because the weight files are named `bcq*.safetensors`: transformers only warns at
an unknown `quant_method` and would fill the weights at random.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor, nn

from hcx.errors import CheckpointError
from hcx.kernels import PackedWeight, Spec, select
from hcx.kernels.format import VERSION
from hcx.kernels.storage import stored_tensors

METHOD = "bcq"
_TARGET = "transformers.quantizers.auto"


class BCQWeight(nn.Module):
    """Holds a binary-coded weight; its buffers carry the names and types of the weight files.

    Args:
        entry: the module's entry in `quantization_config.modules`.
    """

    def __init__(self, entry: Mapping[str, Any]) -> None:
        super().__init__()
        self.entry = dict(entry)
        for name, (shape, dtype) in stored_tensors(entry).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))

    def packed(self) -> PackedWeight:
        """The weight."""
        tensors = {f"module.{name}": buffer for name, buffer in self.named_buffers(recurse=False)}
        packed = PackedWeight.from_tensors("module", tensors, self.entry)
        return packed.at(packed.bits)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # `model.half()` and the like are about activations: rounded scales would be another model.
        for name, buffer in list(self.named_buffers(recurse=False)):
            changed = fn(buffer)
            setattr(self, name, changed if changed.dtype == buffer.dtype else buffer.to(changed.device))
        return self


class BCQLinear(BCQWeight):
    """`y = x W^T` with a binary-coded weight.

    Args:
        entry: the module's entry in `quantization_config.modules`.
        numerics: class of the kernel.
    """

    def __init__(self, entry: Mapping[str, Any], numerics: str = "reference") -> None:
        super().__init__(entry)
        self.numerics = numerics
        self._ready: tuple[Any, Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self._ready is None:
            packed = self.packed()
            backend = select(Spec.of(packed, numerics=self.numerics))
            self._ready = backend, backend.prepack(packed)
        backend, weight = self._ready
        result: Tensor = backend.matmul(x, weight)
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._ready = None  # it may hold the weight of another device
        return super()._apply(fn, recurse)


def replace_linears(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts a `BCQLinear` in the place of every module named.

    Raises:
        CheckpointError: a module does not exist, has a bias, or has another shape.
    """
    for name, entry in modules.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(f"quantization_config.modules.{name}: this model has no such module") from None
        shape = (int(entry["out_features"]), int(entry["in_features"]))
        if not isinstance(linear, nn.Linear) or linear.bias is not None or tuple(linear.weight.shape) != shape:
            raise CheckpointError(f"quantization_config.modules.{name}: not a bias-free linear layer of shape {shape}")
        with torch.device("meta"):
            model.set_submodule(name, BCQLinear(entry))


class _Embedding:
    """A binary-coded token embedding: a holder stands in for it while files are read, then it is dequantized.

    Looking up rows needs them dense, here as in hcx's own decoder. A tied output has no weight to tie to meanwhile.
    """

    def __init__(self, model: Any, entry: Mapping[str, Any]) -> None:
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self._tied = dict(model.all_tied_weights_keys)
        with torch.device("meta"):
            self._holder = BCQWeight(entry)
        model.set_input_embeddings(self._holder)
        if self._tied:
            model.all_tied_weights_keys = {}
            model.set_output_embeddings(nn.Identity())

    def finish(self, model: Any) -> None:
        """Puts the dense embedding in place, and ties the output to it."""
        weight = self._holder.packed().dequantize(self._embedding.weight.dtype)
        self._embedding.weight = nn.Parameter(weight, requires_grad=False)
        model.set_input_embeddings(self._embedding)
        if self._tied:
            model.set_output_embeddings(self._head)
            model.all_tied_weights_keys = self._tied
            model.tie_weights(recompute_mapping=False)


def _register(auto: Any) -> None:
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class BCQConfig(QuantizationConfigMixin):  # type: ignore[misc, no-any-unimported]
        """`quantization_config` of a BCQ directory."""

        def __init__(self, **values: Any) -> None:
            values.setdefault("quant_method", METHOD)
            self.__dict__.update(values)

    class BCQQuantizer(HfQuantizer):  # type: ignore[misc, no-any-unimported]
        """Loads planes, scales and offsets as they are."""

        requires_calibration = True

        def __init__(self, quantization_config: Any, **options: Any) -> None:
            super().__init__(quantization_config, **options)
            self._stated: dict[str, Any] = vars(quantization_config)
            self._embedding: _Embedding | None = None
            version = self._stated.get("version")
            if version != VERSION:
                raise CheckpointError(f"quantization_config.version = {version!r}; this hcx reads {VERSION}")

        def update_attn_implementation(self, config: Any) -> Any:
            # The one hook before the weight files are looked up: it names ours.
            config.transformers_weights = self._stated.get("weight_file", "bcq.safetensors")
            return config

        def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
            modules = dict(self._stated.get("modules", {}))
            names = {id(module): name for name, module in model.named_modules()}
            entry = modules.pop(names[id(model.get_input_embeddings())], None)
            replace_linears(model, modules)
            if entry is not None:
                self._embedding = _Embedding(model, entry)

        def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
            if self._embedding is not None:
                self._embedding.finish(model)
                self._embedding = None
            return model

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    auto.register_quantization_config(METHOD)(BCQConfig)
    auto.register_quantizer(METHOD)(BCQQuantizer)


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Registers as soon as the module with transformers' tables has been executed."""

    def __init__(self) -> None:
        self._inner: Any = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        self._inner, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        found: ModuleType | None = self._inner.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        self._inner.exec_module(module)
        _register(module)


def register() -> None:
    """Registers the format with transformers, now or at its first import; calling it again changes nothing."""
    if _TARGET in sys.modules:
        _register(sys.modules[_TARGET])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
