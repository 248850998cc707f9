"""What a plan will do to a model, told before the work begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hcx.compress.plan import CompressPlan, ModulePlan

_SCALE_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class PreviewRow:
    """Weights that are treated alike.

    Attributes:
        rule: what takes them: a rule's pattern, `default`, `embedding`, `output`, or `(kept)`.
        modules: last parts of the modules' names.
        settings: their settings, or None where weights are kept.
        count: modules.
        weights: number of weights.
        size_bytes: planes, scales and offsets as they will be stored; of kept weights, as they are stored now.
    """

    rule: str
    modules: tuple[str, ...]
    settings: ModulePlan | None
    count: int
    weights: int
    size_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and offsets counted."""
        return 8 * self.size_bytes / self.weights


def stored_bytes(plan: ModulePlan, out_features: int, in_features: int) -> int:
    """Bytes of a weight's planes, scales and offset under the settings (kernels/FORMAT.md)."""
    groups = -(-in_features // min(plan.group_size, in_features))
    planes = plan.bits * out_features * -(-in_features // 8)
    scales = plan.bits * out_features * groups * _SCALE_BYTES[plan.scale_dtype]
    has_offset = plan.offset or plan.method in ("uniform", "searched")
    return planes + scales + (4 * out_features * groups if has_offset else 0)


def preview(
    plan: CompressPlan, shapes: Mapping[str, tuple[int, ...]], chosen: Mapping[str, ModulePlan], kept_bytes: int = 2
) -> list[PreviewRow]:
    """One row per rule and setting, in the order of the model.

    Args:
        plan: the plan.
        shapes: canonical name -> shape of every weight of the model.
        chosen: module -> settings, of every weight that is compressed.
        kept_bytes: per weight that is kept.
    """
    groups: dict[tuple[str, ModulePlan | None], list[str]] = {}
    for name in shapes:
        stem = name.removesuffix(".weight")
        settings = chosen.get(stem)
        rule = "(kept)" if settings is None else plan.rule_of(stem)
        groups.setdefault((rule, settings), []).append(name)
    rows = []
    for (rule, settings), names in groups.items():
        weights = [_product(shapes[name]) for name in names]
        if settings is None:
            size = kept_bytes * sum(weights)
        else:
            size = sum(stored_bytes(settings, shapes[name][0], shapes[name][1]) for name in names)
        ends = dict.fromkeys(name.split(".")[-2] for name in names)
        rows.append(PreviewRow(rule, tuple(ends), settings, len(names), sum(weights), size))
    return rows


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
