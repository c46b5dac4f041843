"""The checked recipe: one YAML file, seven blocks, every error at once and each with its mend."""

from mmssl.config.blocks import DataOptions, OptimOptions, Options, SaveOptions, TrainOptions, WatchOptions
from mmssl.config.chosen import options_of
from mmssl.config.finetune import FinetuneRecipe, checked_views
from mmssl.config.joint import JointRecipe, check_recipe, load_recipe
from mmssl.config.messages import CHOICES, explain, nearest, told
from mmssl.config.reading import (
    ALIASES,
    MAX_BYTES,
    MAX_DEPTH,
    apply_override,
    dump_value,
    find_recipe,
    parse_yaml,
    read_yaml,
    recipe_root,
    shipped_recipes,
)
from mmssl.config.recipe import Recipe, Settings, keyed, recipe_class

__all__ = [
    "ALIASES",
    "CHOICES",
    "MAX_BYTES",
    "MAX_DEPTH",
    "DataOptions",
    "FinetuneRecipe",
    "JointRecipe",
    "OptimOptions",
    "Options",
    "Recipe",
    "SaveOptions",
    "Settings",
    "TrainOptions",
    "WatchOptions",
    "apply_override",
    "check_recipe",
    "checked_views",
    "dump_value",
    "explain",
    "find_recipe",
    "keyed",
    "load_recipe",
    "nearest",
    "options_of",
    "parse_yaml",
    "read_yaml",
    "recipe_class",
    "recipe_root",
    "shipped_recipes",
    "told",
]
