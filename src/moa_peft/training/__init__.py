"""Training from a recipe: `load_recipe` reads it, `train` runs it; `MoATrainer` works on its own too."""

from moa_peft.training.recipe import TrainRecipe, load_recipe, parse_recipe
from moa_peft.training.run import RunResult, train
from moa_peft.training.trainer import MoATrainer

__all__ = ["MoATrainer", "RunResult", "TrainRecipe", "load_recipe", "parse_recipe", "train"]
