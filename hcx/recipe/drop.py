"""DropBP in a run: from the recipe's section to the transform."""

from __future__ import annotations

from hcx.compress.alphatuning import tuned_stems
from hcx.dropbp import DropBP, Trained
from hcx.model.adapters import LoRAConfig
from hcx.model.load import ModelFiles
from hcx.model.transforms import ModelTransform
from hcx.recipe.train import TrainRecipe


def trained_parts(recipe: TrainRecipe) -> Trained:
    """What a run gives gradients to.

    Raises:
        HcxError: the base of an adapter cannot be read, or does not have what the adapter trains.
    """
    if recipe.adapter is None or recipe.init_from is None:
        return Trained()
    if isinstance(recipe.adapter, LoRAConfig):
        return Trained.updates(recipe.adapter, recipe.model)
    with ModelFiles(recipe.init_from) as files:
        # The gradient of scales is a sum over that of their matrix, which has to be computed: it costs as much.
        return Trained(everything=False, matrices=frozenset(tuned_stems(recipe.adapter, files)))


def dropbp_transforms(recipe: TrainRecipe) -> list[ModelTransform]:
    """DropBP as the recipe asks for it, to come after all other transforms; nothing for other runs."""
    if recipe.dropbp is None:
        return []
    engine = recipe.engine
    chunks = engine.pipeline_parallel * engine.virtual_pipeline_parallel if engine.kind == "megatron" else 1
    return [
        DropBP(
            recipe.dropbp,
            recipe.model,
            steps=recipe.train.steps,
            seed=recipe.seed,
            stages=chunks,
            trained=trained_parts(recipe),
            checkpointing=engine.activation_checkpointing,
        )
    ]
