"""A run as a whole: the typed recipe, the rules between its parts, and running it."""

from hcx.recipe.checks import check_recipe
from hcx.recipe.train import DataSection, ExportSection, TrainRecipe, ValidationSection, load_train_recipe

__all__ = [
    "DataSection",
    "ExportSection",
    "TrainRecipe",
    "ValidationSection",
    "check_recipe",
    "load_train_recipe",
]
