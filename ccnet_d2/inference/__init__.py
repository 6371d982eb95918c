"""Running trained models: test modes, predictions from files, pictures, attention maps."""

import ccnet_d2.compat  # noqa: F401  first: it imports Detectron2 without its warnings

from .attention import AttentionMaps, pixel_attention
from .attention_pictures import draw_attention, draw_clip_attention
from .attention_view import AttentionView
from .build import MODE_NAMES, build_mode
from .classes import ClassTable
from .clips import WholeClip
from .images import ImageFileError, find_images, write_image
from .mode import InferenceMode, WholeImage
from .multi_scale import MultiScaleFlip
from .predictor import Prediction, Predictor
from .regions import RegionMap, draw_regions, find_regions
from .sliding_window import SlidingWindow
from .visualize import (
    colorize,
    confidence_map,
    difference,
    overlay,
    save_labels,
    save_prediction_grid,
    side_by_side,
)

__all__ = [
    "MODE_NAMES",
    "AttentionMaps",
    "AttentionView",
    "ClassTable",
    "ImageFileError",
    "InferenceMode",
    "MultiScaleFlip",
    "Prediction",
    "Predictor",
    "RegionMap",
    "SlidingWindow",
    "WholeClip",
    "WholeImage",
    "build_mode",
    "colorize",
    "confidence_map",
    "difference",
    "draw_attention",
    "draw_clip_attention",
    "draw_regions",
    "find_images",
    "find_regions",
    "overlay",
    "pixel_attention",
    "save_labels",
    "save_prediction_grid",
    "side_by_side",
    "write_image",
]
