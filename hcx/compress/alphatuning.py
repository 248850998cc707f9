"""AlphaTuning: adapts a binary-coded model by training scales only (Kwon et al. 2022, arXiv 2210.03858, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Self, cast

from pydantic import model_validator
from torch import Tensor, nn

from hcx.config import Config
from hcx.errors import ConfigError, did_you_mean
from hcx.model.decoder import Decoder
from hcx.model.load import ModelFiles
from hcx.model.parts.linear import LinearPart
from hcx.model.parts.scales import ScaledSource, TrainedScales, local_packed, trained_names
from hcx.model.parts.sources import DenseSource, LinearBlock, SplitSource, WeightSource
from hcx.model.tasks import ScaleTask, is_task_name, stem_of
from hcx.model.transforms import ModelTransform, TransformContext


class AlphaTuningConfig(Config):
    """Trains scales of the binary-coded linear layers and nothing else; planes and all other weights stay."""

    kind: Literal["alphatuning"] = "alphatuning"
    train: TrainedScales = "first"
    """`first`: the scales of the coarsest plane; `all`: of every plane; `offset`: the constant of each group (what
    equals training zero points); `first_and_offset`."""
    grad_scale: Literal["1/g", "1"] = "1/g"
    """Factor of the scales' gradients: divided by the group size, as published, or as they are (Adam does not
    notice)."""
    targets: tuple[str, ...] = ("*",)
    """Shell patterns over module names; the scales of the others are frozen."""
    init_from: str | None = None
    """A task directory whose scales the run starts from; the model's own if not given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.targets:
            raise ValueError("targets is empty; name at least one pattern, such as '*'")
        return self


def tuned_stems(config: AlphaTuningConfig, files: ModelFiles) -> list[str]:
    """The modules whose scales are trained.

    Raises:
        ConfigError: the model has no binary-coded linear layers, or a pattern names none.
    """
    coded = [stem for stem in files.modules if stem.startswith("model.layers.")]
    if not coded:
        raise ConfigError(
            f"adapter.kind = alphatuning: {files.directory} has no binary-coded linear layers; make it so with hcx "
            "compress, or choose adapter.kind = lora"
        )
    for number, pattern in enumerate(config.targets):
        if not any(fnmatchcase(stem, pattern) for stem in coded):
            ends = sorted({"*." + stem.rpartition(".")[2] for stem in coded})
            raise ConfigError(
                f"adapter.targets.{number} = {pattern!r} names no binary-coded layer of {files.directory}; "
                f"{did_you_mean(pattern, ends)}"
            )
    return [stem for stem in coded if any(fnmatchcase(stem, pattern) for pattern in config.targets)]


def trained_count(config: AlphaTuningConfig, files: ModelFiles) -> int:
    """Numbers that are trained: one per row, group and trained plane."""
    total = 0
    for stem in tuned_stems(config, files):
        entry = files.modules[stem]
        groups = -(-int(entry["in_features"]) // int(entry["group_size"]))
        total += int(entry["out_features"]) * groups * len(trained_names(config.train, int(entry["bits"])))
    return total


class AlphaTuning(ModelTransform):
    """Freezes the model and trains scales.

    Args:
        config: which.
        directory: the binary-coded model.
        initial: scales to start from; the model's own if not given.

    Raises:
        ConfigError: the model is not binary-coded, or `initial` trains other scales than `config`.
    """

    def __init__(self, config: AlphaTuningConfig, directory: str, initial: ScaleTask | None = None) -> None:
        self._config, self._directory, self._initial = config, directory, initial
        with ModelFiles(directory) as files:
            self._stems = frozenset(tuned_stems(config, files))
        if initial is not None and initial.train != config.train:
            raise ConfigError(
                f"adapter.init_from: {initial.directory} holds train = {initial.train}, the recipe says "
                f"{config.train}; set adapter.train to the former"
            )

    def apply(self, chunk: nn.Module, context: TransformContext) -> None:
        """See `ModelTransform.apply`."""
        chunk.requires_grad_(False)
        with ModelFiles(self._directory) as files:
            for part in dict.fromkeys(cast(Decoder, chunk).linears().values()):
                if any(block.stem in files.modules for block in part.blocks):
                    sources = {block.stem: self._source(part, block, files) for block in part.blocks}
                    part.replace_source(SplitSource(sources))

    def _source(self, part: LinearPart, block: LinearBlock, files: ModelFiles) -> WeightSource:
        if block.stem not in files.modules:
            weight = cast(DenseSource, part.source).weight.detach()[slice(*block.rows)].clone()
            return DenseSource(nn.Parameter(weight, requires_grad=False), [block.alone()])
        packed = files.packed(block.stem)
        if self._initial is not None:
            packed = self._initial.merged(block.stem, packed)
        local = local_packed(packed, block).to(part.parts.device)
        source = ScaledSource(
            local,
            block.alone(),
            packed.group_size,
            packed.num_groups,
            self._config.train,
            divide=self._config.grad_scale == "1/g",
        )
        return source.requires_grad_(block.stem in self._stems)


def task_of(
    config: AlphaTuningConfig, read: Callable[[str], Tensor], names: Iterable[str], base: str, directory: Path
) -> ScaleTask:
    """The task that trained parameters are; scales of layers that were not trained are left out.

    Args:
        config: what was trained.
        read: canonical name -> full tensor.
        names: canonical names of the parameters.
        base: the binary-coded model.
        directory: where the parameters came from.
    """
    with ModelFiles(base) as files:
        stems = set(tuned_stems(config, files))
    kept = {name: read(name) for name in names if is_task_name(name) and stem_of(name) in stems}
    return ScaleTask(config.train, kept, base, directory)
