"""What a training run takes of a device's memory, and which recipe fits: from a config alone."""

from deepalign_kernels.plan.memory import Memory, Setting, estimate
from deepalign_kernels.plan.recipes import RECIPES, Recipe, first_that_fits
from deepalign_kernels.plan.shape import ModelShape, shape_of

__all__ = [
    "RECIPES",
    "Memory",
    "ModelShape",
    "Recipe",
    "Setting",
    "estimate",
    "first_that_fits",
    "shape_of",
]
