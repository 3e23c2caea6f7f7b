"""What the vision side tells of a prompt's images: how many visual tokens each becomes, and the grids they form.

Processors set images side by side, or break one into rows and frames, so that placeholders alone do not show where an
image ends.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.hooks import Handle, WatchedMethod
from hawk_kernels.hf.prompt import Prompt

Frame = tuple[int, int]
_ATTRIBUTE = "_hawk_kernels_grids"
# what processors call the patches of each image or video, (t, h, w)
_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


class ImageWatch:
    """Notes how many visual tokens each encoded image becomes, for families whose encoder returns whole images.

    Args:
        anatomy: the model's parts.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._multimodal: Any = anatomy.multimodal
        self._kinds = anatomy.family.encoded_whole
        self._thread = _ThreadState()

    def attach(self) -> list[Handle]:
        """Watch the encoding; removing the handles ends that."""
        return _watch_encoding(self._multimodal, self._watch)

    def start(self) -> None:
        """Forget what earlier calls of the multimodal model encoded."""
        self._thread.lengths = {}

    def lengths(self, arguments: dict[str, Any]) -> dict[str, list[int]]:
        """Count the visual tokens of each image and of each video of a call of the multimodal model, by kind.

        Args:
            arguments: those of the call.
        """
        encoded = arguments.get("mm_encoder_outputs") or {}
        given = {kind: _lengths(encoded[kind]) for kind in self._kinds if encoded.get(kind) is not None}
        return {**self._thread.lengths, **given}

    @contextmanager
    def _watch(self, kind: str, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        """Surround a call of `get_image_features` or `get_video_features`; one may call the other."""
        thread = self._thread
        is_inner, thread.is_encoding = thread.is_encoding, True

        def keep(features: Any) -> None:
            if not is_inner and kind in self._kinds:
                thread.lengths[kind] = _lengths(features)

        try:
            yield keep
        finally:
            thread.is_encoding = is_inner


class GridWatch:
    """Notes the grids of what is encoded beside the features, because `generate` hands on the features alone.

    Args:
        anatomy: the model's parts.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._multimodal: Any = anatomy.multimodal

    def attach(self) -> list[Handle]:
        """Watch the encoding; removing the handles ends that."""
        return _watch_encoding(self._multimodal, self._watch)

    @contextmanager
    def _watch(self, kind: str, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        def keep(features: Any) -> None:
            if not isinstance(features, tuple | list | torch.Tensor):
                setattr(features, _ATTRIBUTE, arguments.get(_GRIDS[kind]))

        yield keep


def frames_of_prompt(anatomy: Anatomy, prompt: Prompt, arguments: dict[str, Any]) -> list[list[list[Frame]]]:
    """Find, for each row and each of its images, the grids `(h, w)` of its frames.

    A model that is told grids of patches has these divided by the side of a merge. Elsewhere, and where the caller
    hides some of the tokens, a square number of tokens is taken for a square, and any other for one line.

    Args:
        anatomy: the model's parts.
        prompt: the prompt on the host; `generate` may repeat each sample in several equal rows.
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


def _watch_encoding(multimodal: Any, watch: Callable[..., Any]) -> list[Handle]:
    """Watch the methods that encode images and videos; `watch` gets the kind first."""
    names = ((kind, f"get_{kind}_features") for kind in ("image", "video"))
    return [WatchedMethod(multimodal, name, partial(watch, kind)) for kind, name in names if hasattr(multimodal, name)]


def _lengths(features: Any) -> list[int]:
    """Count the visual tokens of each entry of what an encoder returned; none where it does not tell."""
    pooled = getattr(features, "pooler_output", features)
    if isinstance(pooled, torch.Tensor) and pooled.dim() < 3:
        return []
    if not isinstance(pooled, torch.Tensor | list | tuple):
        return []
    return [entry.shape[:-1].numel() for entry in pooled]


def _describing(
    kind: str, told: dict[str, deque[Frame]], anatomy: Anatomy, prompt: Prompt, copies: int
) -> deque[Frame]:
    """Pick the grids of the placeholders of a kind, or none where those have more or fewer tokens than the grids."""
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
    """Take the next frames for a run of `length` tokens, or none where they do not fill it exactly."""
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


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.is_encoding = False
        self.lengths: dict[str, list[int]] = {}
