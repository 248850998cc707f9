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
from typing import Any

import torch
from torch import Tensor, nn

from hcx.errors import CheckpointError
from hcx.kernels import PackedWeight, Spec, select
from hcx.kernels.format import SCALE_DTYPES

METHOD = "bcq"
_TARGET = "transformers.quantizers.auto"


class BCQLinear(nn.Module):
    """`y = x W^T` with a binary-coded weight; buffers carry the names and types of the weight files.

    Args:
        entry: the module's entry in `quantization_config.modules`.
        numerics: class of the kernel.
    """

    planes: Tensor
    scales: Tensor

    def __init__(self, entry: Mapping[str, Any], numerics: str = "reference") -> None:
        super().__init__()
        self.entry, self.numerics = dict(entry), numerics
        bits, rows, columns = int(entry["bits"]), int(entry["out_features"]), int(entry["in_features"])
        groups = -(-columns // int(entry["group_size"]))
        dtype = next(dtype for dtype, name in SCALE_DTYPES.items() if name == entry["scale_dtype"])
        self.register_buffer("planes", torch.empty(bits, rows, -(-columns // 8), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(bits, rows, groups, dtype=dtype))
        if entry.get("offset"):
            self.register_buffer("offset", torch.empty(rows, groups, dtype=torch.float32))
        self._ready: tuple[Any, Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self._ready is None:
            tensors = {f"module.{name}": buffer for name, buffer in self.named_buffers()}
            packed = PackedWeight.from_tensors("module", tensors, self.entry)
            backend = select(Spec.of(packed, numerics=self.numerics))
            self._ready = backend, backend.prepack(packed)
        backend, weight = self._ready
        result: Tensor = backend.matmul(x, weight)
        return result


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
        parent, _, leaf = name.rpartition(".")
        with torch.device("meta"):
            setattr(model.get_submodule(parent), leaf, BCQLinear(entry))


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

        def update_attn_implementation(self, config: Any) -> Any:
            # The one hook before the weight files are looked up: it names ours.
            config.transformers_weights = getattr(self.quantization_config, "weight_file", "bcq.safetensors")
            return config

        def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
            replace_linears(model, self.quantization_config.modules)

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
