"""The grids that a prompt's visual tokens form, frame by frame."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from hawk_kernels.hf.families import Anatomy
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.watched_method import WatchedMethod

Frame = tuple[int, int]
_ATTRIBUTE = "_hawk_kernels_grids"
# what processors call the patches of each image or video, (t, h, w)
_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


class GridWatch:
    """Notes the grids of what is encoded, with the features: `generate` hands on the features alone."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._multimodal: Any = anatomy.multimodal

    def attach(self) -> list[Any]:
        """Watch the encoding; returns what ends that."""
        names = ((kind, f"get_{kind}_features") for kind in _GRIDS)
        return [
            WatchedMethod(self._multimodal, name, partial(self._watch, kind))
            for kind, name in names
            if hasattr(self._multimodal, name)
        ]

    @contextmanager
    def _watch(self, kind: str, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        def keep(features: Any) -> None:
            if not isinstance(features, tuple | list | torch.Tensor):
                setattr(features, _ATTRIBUTE, arguments.get(_GRIDS[kind]))

        yield keep


def frames_of_prompt(anatomy: Anatomy, prompt: Prompt, arguments: dict[str, Any]) -> list[list[list[Frame]]]:
    """For each row, for each of its images, the grids `(h, w)` of its frames.

    Where the model is told grids of patches, these are divided by the sides of a merge. Elsewhere, and where the caller
    hides some of the tokens, a square number of tokens is taken for a square, and any other for one line.

    Args:
        anatomy: the model's parts.
        prompt: the prompt on the host; for each sample several equal rows where `generate` repeats it.
        arguments: those of the multimodal model.
    """
    told = _told(anatomy, arguments)
    copies = prompt.copies_of_rows(sum(map(_cells, told.values())))
    queues = {kind: _describing(kind, told, anatomy, prompt, copies) for kind in told}
    rows: list[list[list[Frame]]] = []
    for row in range(0, len(prompt.ids), copies):
        images = []
        for image, seen in zip(prompt.whole_images(row), prompt.images(row), strict=True):
            frames = _taken(queues[anatomy.kinds[int(prompt.ids[row, image[0]])]], len(image))
            images.append(frames if frames and len(seen) == len(image) else _guessed(len(seen)))
        rows += [images] * copies
    return rows


def _describing(
    kind: str, told: dict[str, deque[Frame]], anatomy: Anatomy, prompt: Prompt, copies: int
) -> deque[Frame]:
    """The grids of the placeholders of a kind, or none where those have more or fewer tokens than the grids."""
    ids = [token_id for token_id, other in anatomy.kinds.items() if other == kind]
    count = int((prompt.all_placeholders() & np.isin(prompt.ids, ids)).sum())
    # some models mark the frames of a video as images
    candidates = (told[kind], *told.values())
    return next((grids for grids in candidates if grids and _cells(grids) * copies == count), deque())


def _cells(grids: Iterable[Frame]) -> int:
    return sum(height * width for height, width in grids)


def _told(anatomy: Anatomy, arguments: dict[str, Any]) -> dict[str, deque[Frame]]:
    vision = getattr(anatomy.multimodal.config, "vision_config", None)
    side = getattr(vision, "spatial_merge_size", 1)
    told = {}
    for kind in sorted(set(anatomy.kinds.values())):
        encoded = (arguments.get("mm_encoder_outputs") or {}).get(kind)
        grids = getattr(encoded, _ATTRIBUTE, arguments.get(_GRIDS.get(kind, "")))
        patches = grids.tolist() if isinstance(grids, torch.Tensor) else []
        told[kind] = deque((h // side, w // side) for t, h, w in patches for _ in range(t))
    return told


def _taken(queue: deque[Frame], length: int) -> list[Frame]:
    """The next frames of a run of `length` tokens, or none where they do not fill it exactly."""
    frames: list[Frame] = []
    count = 0
    for frame in queue:
        if count >= length:
            break
        frames.append(frame)
        count += math.prod(frame)
    if count != length:
        return []
    for _ in frames:
        queue.popleft()
    return frames


def _guessed(length: int) -> list[Frame]:
    if not length:
        return []
    side = math.isqrt(length)
    return [(side, side)] if side * side == length else [(1, length)]
