"""The backbones and one builder."""

from models.build import BACKBONES, build_model, total_stride

__all__ = ["BACKBONES", "build_model", "total_stride"]
