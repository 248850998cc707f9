"""DropBP in a run: from the recipe's section to the transform."""

from __future__ import annotations

from hcx.dropbp import DropBP
from hcx.engine.config import MegatronEngineConfig
from hcx.model.adapters import LoRAConfig
from hcx.model.transforms import ModelTransform
from hcx.recipe.train import TrainRecipe


def dropbp_transforms(recipe: TrainRecipe) -> list[ModelTransform]:
    """DropBP as the recipe asks for it, to come after all other transforms; nothing for other runs."""
    if recipe.dropbp is None:
        return []
    return [
        DropBP(
            recipe.dropbp,
            recipe.model,
            steps=recipe.train.steps,
            seed=recipe.seed,
            stages=recipe.engine.pipeline_parallel if isinstance(recipe.engine, MegatronEngineConfig) else 1,
            # The gradient of scales is a sum over that of the weight, which has to be computed: it costs as much.
            adapter=recipe.adapter if isinstance(recipe.adapter, LoRAConfig) else None,
            checkpointing=recipe.engine.activation_checkpointing,
        )
    ]
