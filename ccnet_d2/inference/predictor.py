"""Predictions from images in two lines.

predictor = Predictor("camvid/ccnet_R_18_D8_half.py", "output/model_final.pth")
picture = predictor("street.png").overlay()
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ccnet_d2.autocast import amp_dtype, autocast, configured_amp_dtype
from ccnet_d2.checkpoint import load_checkpoint
from ccnet_d2.data.image_files import read_image
from ccnet_d2.devices import available_device
from ccnet_d2.errors import UserError
from ccnet_d2.instantiation import build_object, build_value
from ccnet_d2.model_zoo import get_config
from ccnet_d2.modeling.compilation import compile_model

from .attention import AttentionMaps
from .attention_view import AttentionView
from .build import as_mode, configured_mode
from .classes import ClassTable
from .images import as_rgb, find_images
from .label_bands import labels_of
from .mode import InferenceMode, innermost
from .visualize import overlay

__all__ = ["Prediction", "Predictor"]


@dataclass(frozen=True)
class Prediction:
    """One segmented image.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8 class indices (int16 above 255 classes).
        logits: (K, H, W) float tensor, or None where only labels were asked for.
        classes: names and colours.
        path: the file, where there is one.
    """

    image: np.ndarray
    labels: np.ndarray
    logits: Tensor | None
    classes: ClassTable
    path: Path | None = None

    def overlay(self, alpha: float = 0.5) -> np.ndarray:
        """Class colours over the image with a legend, (…, …, 3) uint8; see `visualize.overlay`."""
        return overlay(self.image, self.labels, self.classes, alpha=alpha)

    def confidence(self) -> np.ndarray:
        """Probability of the winning class, (H, W) float32.

        Raises:
            ValueError: the logits were not kept.
        """
        if self.logits is None:
            raise ValueError("the confidence needs logits: predict with labels_only=False.")
        # exp(max - logsumexp) is the largest softmax value without a second tensor of all classes.
        logits = self.logits.float()
        return (logits.amax(dim=0) - logits.logsumexp(dim=0)).exp().cpu().numpy()


class Predictor:
    """Segments images given as files, arrays or Pillow images.

    Example:
        >>> predictor = Predictor("camvid/ccnet_R_18_D8_half.py", "output/model_final.pth")  # doctest: +SKIP
        >>> labels = predictor("street.png").labels  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module | DictConfig | str | os.PathLike[str],
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        mode: str | InferenceMode | None = None,
        classes: ClassTable | str | Sequence[str] | None = None,
        input_format: str | None = None,
        augmentations: Sequence[Any] | None = None,
        compile: bool | None = None,
        amp: bool | str | None = None,
    ) -> None:
        """
        Args:
            model: a model of Detectron2's convention (see `inference.mode`), which is put into evaluation mode and
                not copied; a run (LazyConfig), or a run's name or file as `model_zoo.get_config` takes it.
            checkpoint: weights to load; default: `train.init_checkpoint` of a run, none for a model.
            device: where to run; default: where a given model is; for a run the GPU if there is one, else the
                CPU.
            mode: a test mode or its name ("whole", "slide", "ms", "ms-slide"); default: `test.inference` of a
                run if it has one, else "whole".
            classes: names and colours: a `ClassTable`, the name of a registered data set, or class names;
                default: those of a run's test data set, else numbers.
            input_format: channel order the model wants; default: its `input_format`.
            augmentations: Detectron2 augmentations to apply to images, such as a resize; default: those of a
                run's test mapper. Answers come back in the image's own size.
            compile: run the model through torch.compile, which pays from some dozens of images on; default:
                `train.compile` of a run.
            amp: run the model under autocast: "bfloat16", "float16", or True for what suits the device; faster
                where it has units for it. Default: `train.amp` of a run. Where a pixel looks is always
                computed in the model's own dtype.

        Raises:
            UserError: no such run or checkpoint, a run without weights, no such device, an input format that
                is neither given nor known, or an `amp` that the device does not run.
        """
        if isinstance(model, str | os.PathLike):
            model = get_config(os.fspath(model))
        cfg = model if isinstance(model, DictConfig) else None
        if cfg is not None:
            checkpoint = checkpoint or OmegaConf.select(cfg, "train.init_checkpoint")
            if not checkpoint:
                raise UserError("no weights to predict with: give a checkpoint (train.init_checkpoint=PATH).")
            device = device or OmegaConf.select(cfg, "train.device") or "cpu"
            model = build_object(cfg, "model")
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a module, a LazyConfig or the name of one, got {type(model).__name__}."
            )
        if device is not None:
            device = available_device(device)
        runs_on = device or next((p.device for p in model.parameters()), torch.device("cpu"))
        self._device_type = runs_on.type
        self._amp_dtype = _amp_dtype(amp, cfg, self._device_type)
        # What is wrong with the arguments is said by now, before weights are read.
        if checkpoint is not None:
            load_checkpoint(model, os.fspath(checkpoint))
        self.model = model if device is None else model.to(device)
        self.model.eval()
        if OmegaConf.select(cfg, "train.compile") if compile is None and cfg is not None else compile:
            compile_model(self.model)

        self.input_format = input_format or getattr(model, "input_format", None)
        if self.input_format not in ("RGB", "BGR"):
            raise UserError(
                f"the channel order of {type(model).__name__} must be 'RGB' or 'BGR', "
                f"got {self.input_format!r}: give input_format."
            )
        if augmentations is None:
            augmentations = _test_augmentations(cfg)
        self.augmentations = T.AugmentationList(list(augmentations))
        if mode is None and cfg is not None:
            mode = configured_mode(cfg)
        names = classes if isinstance(classes, str) else None
        if names is None and cfg is not None:
            names = OmegaConf.select(cfg, "dataloader.test.dataset.names")
        self.mode = as_mode("whole" if mode is None else mode).bind(self.model, names)
        self._classes = _classes(classes, cfg)

    def __call__(
        self,
        image: str | os.PathLike[str] | np.ndarray | Any,
        *,
        labels_only: bool = False,
    ) -> Prediction:
        """Segment one image.

        Args:
            image: a file, a Pillow image, or a uint8 array (H, W, 3) in RGB order or (H, W) grey. Files and Pillow
                images are turned upright as their EXIF says. OpenCV's arrays are BGR: give `image[:, :, ::-1]`.
            labels_only: do not keep logits; needs far less memory for large images.

        Returns:
            The prediction in the image's own size.

        Raises:
            ValueError: the file is missing, truncated or no image (`SampleError`), or an array is of another
                kind.
            UserError: the model has another number of classes than names were given for, or was put into training mode
                since.
        """
        path = Path(image) if isinstance(image, str | os.PathLike) else None
        rgb = read_image(str(path)) if path is not None else as_rgb(image)
        inputs = [self._inputs(rgb)]
        if not labels_only:
            return self.prediction_of(rgb, self.logits(inputs), path)
        with autocast(self._device_type, self._amp_dtype):
            labels = self.mode.predict_labels(inputs)[0]
        return Prediction(rgb, labels.numpy(), None, self._class_table(None, labels), path)

    def logits(self, inputs: list[dict[str, Any]]) -> Tensor:
        """(K, H, W), or (T, K, H, W) of a clip, in the test mode and under autocast.

        Args:
            inputs: one dict of Detectron2's convention.
        """
        with autocast(self._device_type, self._amp_dtype):
            logits: Tensor = self.mode(inputs)[0]["sem_seg"]
        return logits

    def prediction_of(self, image: np.ndarray, logits: Tensor, path: Path | None = None) -> Prediction:
        """The prediction that logits of this model mean.

        Args:
            image: (H, W, 3) uint8 RGB.
            logits: (K, H, W).
            path: the image's file.

        Raises:
            UserError: the model has another number of classes than names were given for.
        """
        labels = labels_of(logits)
        return Prediction(image, labels.numpy(), logits, self._class_table(logits.shape[0], labels), path)

    def predict_all(
        self, inputs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, labels_only: bool = True
    ) -> Iterator[Prediction]:
        """Segment files, folders and glob patterns, one image after the other as they are asked for.

        Args:
            inputs: see `find_images`; a missing file is an error at once, before anything is predicted.
            labels_only: see `__call__`.

        Raises:
            ImageFileError: a path does not exist, or there is no image.
        """
        paths = find_images(inputs)
        return (self(path, labels_only=labels_only) for path in paths)

    def attention(
        self,
        image: str | os.PathLike[str] | np.ndarray | Any,
        x: int,
        y: int,
        *,
        recurrence: int | None = None,
        layer: str | None = None,
    ) -> AttentionMaps:
        """Where a pixel looks after 1 … R loops of the model's criss-cross attention; the image is run whole.

        Args:
            image: see `__call__`.
            x, y: the pixel, column and row in the image.
            recurrence: R; default: the layer's own.
            layer: name of the RCCA layer, where the model has several.

        Raises:
            UserError: the pixel lies outside the image, or the model has no such layer.
        """
        return self.look_into(image, layer=layer).at(x, y, recurrence=recurrence)

    def look_into(
        self, image: str | os.PathLike[str] | np.ndarray | Any, *, layer: str | None = None
    ) -> AttentionView:
        """Run an image, whole, to ask where any number of its pixels look.

        Args:
            image: see `__call__`.
            layer: name of the RCCA layer, where the model has several.

        Raises:
            ValueError: the model has no such layer.
        """
        path = Path(image) if isinstance(image, str | os.PathLike) else None
        rgb = read_image(str(path)) if path is not None else as_rgb(image)
        return AttentionView.of(self.model, rgb, self._inputs(rgb), layer)

    def _inputs(self, rgb: np.ndarray) -> dict[str, Any]:
        if self.model.training:
            raise UserError(
                f"the predictor's {type(self.model).__name__} was put into training mode: call model.eval() before "
                "predicting, or give the predictor a copy of the model."
            )
        height, width = rgb.shape[:2]
        augmented = T.AugInput(rgb if self.input_format == "RGB" else rgb[:, :, ::-1])
        self.augmentations(augmented)
        image = torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        return {"image": image, "height": height, "width": width}

    def _class_table(self, num_classes: int | None, labels: Tensor) -> ClassTable:
        """The names given, once they are known to fit the model; without any, numbers."""
        if num_classes is None:  # of labels alone: as the model says, if it does
            head = getattr(innermost(self.model), "sem_seg_head", None)
            num_classes = getattr(head, "num_classes", None)
        known = self._classes
        if known is None:
            return ClassTable.numbered(num_classes or int(labels.max()) + 1)
        if (num_classes is not None and num_classes != len(known)) or int(labels.max()) >= len(known):
            found = num_classes or int(labels.max()) + 1
            raise UserError(
                f"the model gives {found} classes, but {len(known)} class names are known; "
                "give `classes` that belong to it."
            )
        return known


def _amp_dtype(amp: bool | str | None, cfg: DictConfig | None, device_type: str) -> torch.dtype | None:
    if amp is None and cfg is not None:
        return configured_amp_dtype(cfg, device_type)
    if not amp:
        return None
    return amp_dtype("auto" if amp is True else amp, device_type, key="amp")


def _test_augmentations(cfg: DictConfig | None) -> list[Any]:
    configured = None if cfg is None else OmegaConf.select(cfg, "dataloader.test.mapper.augmentations")
    return list(build_value(configured, "dataloader.test.mapper.augmentations")) if configured else []


def _classes(classes: ClassTable | str | Sequence[str] | None, cfg: DictConfig | None) -> ClassTable | None:
    if classes is None and cfg is not None:
        return ClassTable.from_run(cfg)
    if isinstance(classes, str):
        return ClassTable.from_metadata(MetadataCatalog.get(classes))
    if classes is None or isinstance(classes, ClassTable):
        return classes
    return ClassTable.create(classes)
