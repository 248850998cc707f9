"""Blocks quantized with calibration text, as a walk over a model's tensors asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from hcx.artifacts import digest_bytes
from hcx.compress.calibration import BlockResult, Calibrator, InputStatistics, Quantized
from hcx.compress.plan import CompressPlan, ModulePlan
from hcx.compress.scaling import ScaleSearch
from hcx.compress.uniform import quantize_uniform
from hcx.data.batch import MicroBatch
from hcx.errors import ConfigError
from hcx.kernels import PackedWeight
from hcx.kernels.segmented import SegmentedWeight
from hcx.model.load import ModelFiles

_LAYERS = "model.layers."


def calibration_digest(batches: Sequence[MicroBatch]) -> str:
    """Of the tokens and of what counts among them: unfinished work goes on with the same text only."""
    return digest_bytes(
        b"".join(part.contiguous().numpy().tobytes() for b in batches for part in (b.tokens, b.weights))
    )


class CalibratedBlocks:
    """Each block's outcome, made when the first of its tensors is asked for.

    Args:
        files: the full-precision model.
        chosen: what becomes of each linear layer, by stem.
        plan: whether scales are searched.
        calibration: the text.
    """

    def __init__(
        self, files: ModelFiles, chosen: dict[str, ModulePlan], plan: CompressPlan, calibration: Sequence[MicroBatch]
    ) -> None:
        self._chosen = chosen
        search = ScaleSearch(self._trial) if plan.calibration.scaling else None
        self._calibrator = Calibrator(files.config, files.read, calibration, self._quantize, search)
        self._current = BlockResult()

    def of(self, name: str) -> BlockResult | None:
        """The block that a tensor belongs to, or None for embedding, output and the last norm."""
        if not name.startswith(_LAYERS):
            return None
        layer = int(name.removeprefix(_LAYERS).split(".")[0])
        while self._calibrator.layer <= layer:
            self._current = self._calibrator.next_block()
        return self._current

    def skip(self, names: Sequence[str], stored: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Passes over a block that an interrupted compression had finished, with what it stored.

        Args:
            names: the block's tensors; others are no block and nothing is done.
            stored: the file of the layer.
            entries: of its binary-coded weights, by stem.
        """
        if not names[0].startswith(_LAYERS):
            return
        tensors = load_file(stored)
        changed: dict[str, Tensor] = {}
        for stem, entry in entries.items():
            own = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == stem}
            packed = PackedWeight.from_tensors(stem, own, entry)
            changed[f"{stem}.weight"] = packed.at(packed.bits).dequantize()
        changed.update({name: tensors[name] for name in names if name in tensors})
        self._calibrator.skip(changed)

    def _quantize(self, stem: str, weight: Tensor, statistics: InputStatistics) -> Quantized | None:
        module = self._chosen.get(stem)
        if module is None:
            return None
        try:
            found = module.quantize(weight, statistics)
        except ConfigError as error:
            raise ConfigError(f"{stem}.weight: {error}") from None
        if isinstance(found, SegmentedWeight):
            raise ConfigError(f"{stem}: only embedding and output are clustered")
        return found

    def _trial(self, stem: str, weight: Tensor) -> Tensor | None:
        # Rounding stands in for the slower methods: what counts is how hard a scaled weight is on so many levels.
        module = self._chosen.get(stem)
        return None if module is None else quantize_uniform(weight, module.bits, module.group_size).dequantize()
