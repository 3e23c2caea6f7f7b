"""Finds the grids that the visual tokens of each image form, frame by frame, from what the vision encoder was told.

Processors set images side by side, or break one into rows and frames, so that placeholders alone do not show where an
image ends.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

import numpy as np
import torch

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.sources import Encoded

Frame = tuple[int, int]
# what processors call the patches of each image or video, (t, h, w)
_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


def frames_of_prompt(anatomy: Anatomy, prompt: Prompt, encoded: dict[str, Encoded]) -> list[list[list[Frame]]]:
    """Find, for each row and each of its images, the grids `(h, w)` of its frames.

    Where the model is told the grids of patches, their sides are divided by the side of a merge. Elsewhere a video has
    as many frames as its pixels, all of equal length, and perhaps one token after them. A frame or image whose grid is
    not known, or some of whose tokens the caller hides, is taken for a square if its number of tokens is a square
    number, and for a single line otherwise.

    Args:
        anatomy: the model's parts.
        prompt: the prompt on the host; `generate` may repeat each sample in several equal rows.
        encoded: what the vision encoder was told and returned, by kind.
    """
    told = _told(anatomy, encoded)
    copies = prompt.copies_of_rows(sum(map(_cells, told.values())))
    queues = {kind: _describing(kind, told, anatomy, prompt, copies) for kind in told}
    rows: list[list[list[Frame]]] = []
    for row in range(0, len(prompt.ids), copies):
        if prompt.tiles is not None:
            rows += [_frames_of_tiles(prompt, row)] * copies
            continue
        images = []
        for image, seen in zip(prompt.whole_images(row), prompt.images(row), strict=True):
            kind = anatomy.kinds[int(prompt.ids[row, image[0]])]
            frames = _taken(queues[kind], len(image))
            if len(seen) != len(image):
                frames = _guessed(len(seen))
            elif not frames:
                is_video = kind == "video" and kind in encoded
                frames = _frames_of_video(len(image), encoded[kind], told[kind]) if is_video else _guessed(len(image))
            images.append(frames)
        rows += [images] * copies
    return rows


def _frames_of_tiles(prompt: Prompt, row: int) -> list[list[Frame]]:
    """Find the grid of each tile of a row, as one frame."""
    from hawk_kernels.hf.tiles import grids_of_tiles

    lengths = [len(unit) for unit in prompt.candidates().units(row)]
    return [
        _guessed(length) if grid is None else [grid]
        for grid, length in zip(grids_of_tiles(prompt, row), lengths, strict=True)
    ]


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


def _told(anatomy: Anatomy, encoded: dict[str, Encoded]) -> dict[str, deque[Frame]]:
    vision = getattr(anatomy.multimodal.config, "vision_config", None)
    side = getattr(vision, "spatial_merge_size", 1)
    told = {}
    for kind in sorted(set(anatomy.kinds.values())):
        grids = encoded[kind].arguments.get(_GRIDS.get(kind, "")) if kind in encoded else None
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


def _frames_of_video(length: int, run: Encoded, grids: Iterable[Frame]) -> list[Frame]:
    """Divide a video of `length` tokens into frames where its grids do not describe them.

    Args:
        length: its tokens.
        run: what the encoder was told and returned.
        grids: those of the frames of all videos, where the encoder merges frames; else none.
    """
    sizes, entries = set(grids), set(run.lengths)
    if len(sizes) == 1 and length % _cells(sizes) == 0:
        return [*sizes] * (length // _cells(sizes))
    pixels = run.arguments.get("pixel_values_videos", run.arguments.get("pixel_values"))
    count = 1
    if isinstance(pixels, torch.Size) and len(pixels) == 5:
        # [videos, frames, channels, height, width]
        count = pixels[1]
    elif len(entries) == 1 and length % min(entries) == 0:
        count = length // min(entries)
    per_frame, rest = divmod(length, count)
    # LLaVA-OneVision ends a video with a newline
    return _guessed(per_frame) * count + [(1, 1)] * rest if per_frame and rest <= 1 else _guessed(length)


def _guessed(length: int) -> list[Frame]:
    if not length:
        return []
    side = math.isqrt(length)
    return [(side, side)] if side * side == length else [(1, length)]
