# SPDX-License-Identifier: Apache-2.0
"""Training by recipe."""

from hourllava.train.engine import run
from hourllava.train.recipes import RECIPES, Lesson, Recipe, Stage, Training
from hourllava.train.training import train

__all__ = ["RECIPES", "Lesson", "Recipe", "Stage", "Training", "run", "train"]
