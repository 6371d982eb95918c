"""Models and images of the viewer, and the pictures computed from them. Knows nothing of the web.

Uploaded files are data: they are decoded by Pillow, in formats from a list, and neither stored nor passed on.
"""

from __future__ import annotations

import base64
import io
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ccnet_d2.data.image_files import read_image
from ccnet_d2.errors import UserError

from ..attention_pictures import heat_over_image
from ..attention_view import AttentionView, find_image_rcca
from ..drawing import resize_rgb
from ..images import as_rgb
from ..predictor import Prediction, Predictor
from ..visualize import overlay

__all__ = ["MOST_LOOPS", "Gallery", "UploadError"]

MOST_LOOPS = 8
"""Largest R that may be asked for."""

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
_MOST_PIXELS = 100_000_000
_KEPT_UPLOADS = 16
_KEPT_VIEWS = 8


class UploadError(UserError):
    """An uploaded file is no image that can be taken."""


@dataclass(frozen=True)
class _Entry:
    """An image: what to call it, its size as shown, and its file or, of an upload, its pixels."""

    name: str
    height: int
    width: int
    source: Path | np.ndarray


class Gallery:
    """Models by index and images by number; what they compute is kept for the next click."""

    def __init__(
        self,
        models: Sequence[tuple[str, Predictor]],
        images: Sequence[Path] = (),
        *,
        longest_side: int = 1024,
    ) -> None:
        """
        Args:
            models: names and predictors; at least one has criss-cross attention.
            images: files to begin with; each is read at once, to know that it can be, and again when it is shown.
            longest_side: larger images are reduced to it.

        Raises:
            UserError: no model, none of them has criss-cross attention, or that of one is over clips.
            SampleError: a file is missing or no image.
        """
        if not models:
            raise UserError("the viewer needs a model to look into.")
        self.models = list(models)
        self.longest_side = longest_side
        self._recurrences = [_recurrence(predictor) for _, predictor in models]
        if not any(self._recurrences):
            raise UserError(
                "none of the models has criss-cross attention (RCCA) to look into: choose a run whose "
                "model.sem_seg_head.context is rcca."
            )
        self._lock = (
            threading.Lock()
        )  # requests come from several threads, and models are run by one at a time
        self._images: OrderedDict[int, _Entry] = OrderedDict()
        self._views: OrderedDict[tuple[int, int], AttentionView | Prediction] = OrderedDict()
        self._next = 0
        self._given = len(images)
        for path in images:
            self._add(path.name, read_image(str(path)), path)

    def describe(self) -> dict[str, Any]:
        """Models with their R (0: no criss-cross attention), images with their sizes, and the limits."""
        with self._lock:
            return {
                "models": [
                    {"name": name, "recurrence": loops}
                    for (name, _), loops in zip(self.models, self._recurrences, strict=True)
                ],
                "images": [_described(number, entry) for number, entry in self._images.items()],
                "most_loops": MOST_LOOPS,
            }

    def upload(self, name: str, content: bytes) -> dict[str, Any]:
        """Take an image.

        Args:
            name: what to call it.
            content: of the file.

        Returns:
            Its number, name, width and height.

        Raises:
            UploadError: it is no image of a common format, damaged, or too large.
        """
        image = _decode(content)
        with self._lock:
            number = self._add(name[:80], image)
            uploads = [known for known in self._images if known >= self._given]
            for old in uploads[: max(len(uploads) - _KEPT_UPLOADS, 0)]:
                del self._images[old]
                for key in [key for key in self._views if key[0] == old]:
                    del self._views[key]
            return _described(number, self._images[number])

    def picture(self, number: int) -> bytes:
        """An image as PNG.

        Raises:
            UserError: there is no such image.
        """
        with self._lock:
            return _png(self._image(number))

    def prediction(self, number: int, model: int) -> bytes:
        """What a model predicts for an image, as PNG: class colours over the image.

        Raises:
            UserError: there is no such image or model.
        """
        with self._lock:
            found = self._prediction(number, model)
            return _png(overlay(found.image, found.labels, found.classes, with_legend=False))

    def classes(self, number: int, model: int) -> list[dict[str, Any]]:
        """The classes that a model finds in an image, most frequent first: "name", "color" as in the picture of the
        prediction ([r, g, b]), and "share" of the pixels.

        Raises:
            UserError: there is no such image or model.
        """
        with self._lock:
            found = self._prediction(number, model)
        indices, counts = np.unique(found.labels, return_counts=True)
        return [
            {
                "name": found.classes.names[indices[k]],
                "color": found.classes.colors[indices[k]].tolist(),
                "share": float(counts[k] / found.labels.size),
            }
            for k in np.argsort(-counts, kind="stable")
        ]

    def attention(
        self, number: int, model: int, x: int, y: int, recurrence: int | None = None
    ) -> dict[str, Any]:
        """Where a pixel of an image looks in a model, after 1 … R loops.

        Args:
            number, model: which image and model.
            x, y: the pixel.
            recurrence: R; default: the model's own.

        Returns:
            "cell": row and column of the pixel in the feature map, "grid": its rows and columns, "extent": how many
            of them the image covers, and for each loop in "maps" its largest share, the shares (base64 of
            float32, row by row) and a picture (base64 of PNG).

        Raises:
            UserError: there is no such image, model or pixel, the model has no criss-cross attention, or R is not
                between 1 and `MOST_LOOPS`.
        """
        if recurrence is not None and not 1 <= recurrence <= MOST_LOOPS:
            raise UserError(f"R must lie between 1 and {MOST_LOOPS}, got {recurrence}.")
        with self._lock:
            view = self._view(number, model)
            if not isinstance(view, AttentionView):
                raise UserError(f"{self.models[model][0]} has no criss-cross attention to look into.")
            found = view.at(x, y, recurrence=recurrence)
        return {
            "cell": list(found.cell),
            "grid": list(found.maps[0].shape),
            "extent": list(found.extent),
            "maps": [
                {
                    "largest": float(shares.max()),
                    "shares": _base64(shares.astype("<f4").tobytes()),
                    "picture": _base64(_png(heat_over_image(found.image, shares, found.extent))),
                }
                for shares in found.maps
            ],
        }

    def _add(self, name: str, image: np.ndarray, path: Path | None = None) -> int:
        number, self._next = self._next, self._next + 1
        image = self._reduced(image)
        # Of a folder there may be thousands: they are read again when they are looked at.
        self._images[number] = _Entry(name, image.shape[0], image.shape[1], path or image)
        return number

    def _reduced(self, image: np.ndarray) -> np.ndarray:
        shrink = self.longest_side / max(image.shape[:2])
        if shrink >= 1:
            return image
        height, width = (max(round(side * shrink), 1) for side in image.shape[:2])
        return resize_rgb(image, height, width)

    def _image(self, number: int) -> np.ndarray:
        entry = self._images.get(number)
        if entry is None:
            raise UserError(f"there is no image {number} (any more): choose one again.")
        if isinstance(entry.source, np.ndarray):
            return entry.source
        image = self._reduced(read_image(str(entry.source)))
        if image.shape[:2] != (entry.height, entry.width):
            raise UserError(
                f"{entry.source} has another size than when the viewer was started: start it again."
            )
        return image

    def _prediction(self, number: int, model: int) -> Prediction:
        view = self._view(number, model)
        if isinstance(view, AttentionView):
            return self.models[model][1].prediction_of(view.image, view.logits)
        return view

    def _view(self, number: int, model: int) -> AttentionView | Prediction:
        """The image within the model; what it predicts, where the model has no RCCA."""
        if not 0 <= model < len(self.models):
            raise UserError(f"there is no model {model}: there are {len(self.models)}.")
        key = number, model
        if key not in self._views:
            image = self._image(number)
            predictor = self.models[model][1]
            if self._recurrences[model]:
                self._views[key] = predictor.look_into(image)
            else:
                self._views[key] = predictor(image, labels_only=True)
            while len(self._views) > _KEPT_VIEWS:
                self._views.popitem(last=False)
        self._views.move_to_end(key)
        return self._views[key]


def _recurrence(predictor: Predictor) -> int:
    """R of the model's RCCA, 0 where it has none; several are an error, as elsewhere, and one over clips is."""
    try:
        return find_image_rcca(predictor.model).recurrence
    except ValueError as error:
        if "has no criss-cross attention" in str(error):
            return 0
        raise


def _decode(content: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise UploadError(
                        f"the image has {image.width}x{image.height} pixels: that is too large."
                    )
                return as_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UploadError("the image is too large.") from error
    # Pillow's decoders raise these for files they cannot make sense of.
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UploadError("the file is damaged or no image (PNG, JPEG, WebP, BMP, TIFF, GIF).") from error


def _described(number: int, entry: _Entry) -> dict[str, Any]:
    return {"id": number, "name": entry.name, "width": entry.width, "height": entry.height}


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
