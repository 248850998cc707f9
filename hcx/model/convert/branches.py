"""Where the residual branches of `transformers` decoders are: by the names that their blocks give them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hcx.errors import ConfigError

_PRE_NORM = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
_BRANCHES = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "hyperclovax": (("input_layernorm", "self_attn", "post_norm1"), ("post_attention_layernorm", "mlp", "post_norm2")),
}
"""model_type -> the modules of each residual branch of a block, in the order in which they run."""


@dataclass(frozen=True)
class ResidualBlock:
    """A block of a foreign decoder.

    Attributes:
        module: the block.
        branches: the modules of its attention branch and of its MLP branch, in the order in which they run.
    """

    module: nn.Module
    branches: tuple[tuple[nn.Module, ...], ...]

    def checkpoint(self, wanted: bool) -> None:
        """Whether gradient checkpointing, where it is on, covers this block."""
        if not hasattr(self.module, "gradient_checkpointing"):
            return
        configured = getattr(self.module, "_hcx_checkpointing", None)
        if not wanted and configured is None:
            self.module._hcx_checkpointing = bool(self.module.gradient_checkpointing)  # type: ignore[assignment]
            self.module.gradient_checkpointing = False  # type: ignore[assignment]
        elif wanted and configured is not None:
            self.module.gradient_checkpointing = configured
            del self.module._hcx_checkpointing


def residual_blocks(model: nn.Module) -> list[ResidualBlock]:
    """The blocks of a causal language model of `transformers`, or of a wrapper around one.

    Raises:
        ConfigError: the model has no residual branches that are known here.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    names = _BRANCHES.get(str(kind))
    if names is None:
        raise ConfigError(
            f"DropBP: {type(model).__name__} (model_type {kind}) has no residual sublayers that are known here; "
            f"known: {', '.join(_BRANCHES)}"
        )
    blocks = []
    for module in model.modules():
        if all(hasattr(module, name) for branch in names for name in branch if not name.startswith("post_norm")):
            # A norm that the configuration leaves out is None.
            found = [[getattr(module, name, None) for name in branch] for branch in names]
            branches = tuple(tuple(m for m in branch if isinstance(m, nn.Module)) for branch in found)
            blocks.append(ResidualBlock(module, branches))
    if not blocks:
        raise ConfigError(f"DropBP: {type(model).__name__} has no block with {', '.join(n for b in names for n in b)}")
    return blocks
