"""Reads the pictures and videos that a caller passes, as Pillow images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_EXPECTED = (
    "image: expected a PIL image, an array [height, width, 3], a video as a list of images or an array [frames, "
)
_EXPECTED += "height, width, 3], or a list of these in the order of the prompt"


@dataclass(frozen=True)
class Given:
    """One picture, or the frames of one video.

    Attributes:
        frames: in RGB, one for a picture.
        is_video: whether it was given as a video.
    """

    frames: list[Image.Image]
    is_video: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames[0].size


def pictures_of(image: Any) -> list[Given]:
    """List what a caller passed as `image`, one entry for each picture or video.

    Raises:
        TypeError, ValueError: it is none of what `overlay` takes.
    """
    items = list(image) if isinstance(image, list | tuple) else [image]
    if not items:
        raise ValueError(f"{_EXPECTED}; got an empty list; pass the pictures that the processor got")
    return [_one(item) for item in items]


def _one(item: Any) -> Given:
    if isinstance(item, list | tuple):
        if not item:
            raise ValueError(f"{_EXPECTED}; got a video without frames; pass the frames that the processor got")
        return Given([_one(frame).frames[0] for frame in item], is_video=True)
    if hasattr(item, "convert"):
        return Given([item.convert("RGB")])
    if hasattr(item, "detach"):
        item = item.detach().cpu().numpy()
    if not isinstance(item, np.ndarray):
        raise TypeError(f"{_EXPECTED}; got {type(item).__name__}; open files with PIL.Image.open")
    if item.ndim == 4:
        return Given([_from_array(frame) for frame in item], is_video=True)
    return Given([_from_array(item)])


def _from_array(array: np.ndarray) -> Image.Image:
    from PIL import Image

    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3, 4):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.size == 0:
        raise ValueError(f"{_EXPECTED}; got an array of shape {list(array.shape)}; move colours to the last axis")
    if array.dtype.kind == "f":
        array = array * (255.0 if np.nanmax(array) <= 1.0 else 1.0)
    return Image.fromarray(np.clip(np.nan_to_num(array), 0, 255).astype(np.uint8)).convert("RGB")
