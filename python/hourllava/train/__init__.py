# SPDX-License-Identifier: Apache-2.0
"""Training by recipe."""

from hourllava.train.engine import run
from hourllava.train.recipes import RECIPES, Lesson, Recipe, Stage

__all__ = ["RECIPES", "Lesson", "Recipe", "Stage", "run"]
