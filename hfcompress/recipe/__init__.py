"""A recipe: what to compress, on which task, by which steps; read from YAML, strictly."""

from __future__ import annotations

from hfcompress.recipe.loading import load_recipe, parse_recipe
from hfcompress.recipe.schema import EvaluationConfig, PushConfig, Recipe, Step

__all__ = ["EvaluationConfig", "PushConfig", "Recipe", "Step", "load_recipe", "parse_recipe"]
