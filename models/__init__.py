"""The backbones and one builder."""

from models.build import BACKBONES, build_model, timms_name
from models.recipe import of_timm, recipe
from models.weights import load_weights

__all__ = ["BACKBONES", "build_model", "load_weights", "of_timm", "recipe", "timms_name"]
