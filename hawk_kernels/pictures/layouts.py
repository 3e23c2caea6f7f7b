"""Turns the entries of one image or video into sheets, which say where each visual token stands on the picture."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from hawk_kernels.pictures.entries import Entry, split_at_text
from hawk_kernels.pictures.sheets import (
    WHOLE,
    Arrange,
    Arrangement,
    Box,
    Canvas,
    Sheet,
    Size,
    UnknownGeometryError,
    WrongPictureError,
    arrangement_by_marks,
    centre_square,
    letterboxed,
    may_have_shape,
    nearest_shape,
    square_grid,
    stretched,
    stretched_canvas,
)

Fit = Callable[[Size], Box]


@dataclass(frozen=True)
class Pictured:
    """An image or video whose tokens are to be placed.

    Attributes:
        entries: what the encoder returned for it, in order.
        ids: token ids of its row, int64 `[T]`.
        size: of the caller's picture or frames; None where the caller gave none.
        multimodal: the model.
        processor: the one that made the inputs, or None.
    """

    entries: Sequence[Entry]
    ids: np.ndarray
    size: Size | None
    multimodal: Any
    processor: Any

    @property
    def first(self) -> Entry:
        return self.entries[0]

    def known_size(self) -> Size:
        """Return the size, or raise if a layout cannot do without it."""
        if self.size is None:
            raise UnknownGeometryError("how the picture was cut depends on its shape; pass image=")
        return self.size


Layout = Callable[[Pictured], list[Sheet]]


def told_row(entry: Entry, name: str) -> list[int]:
    """Return the entry's row of a table that the encoder was told, such as `image_grid_thw`.

    Raises:
        UnknownGeometryError: it was told none.
    """
    table = entry.arguments.get(name)
    if not isinstance(table, torch.Tensor) or table.dim() != 2 or entry.index >= len(table):
        raise UnknownGeometryError(f"the encoder was told no {name}")
    return [int(value) for value in table[entry.index].tolist()]


def pixel_shape(entry: Entry) -> tuple[int, ...]:
    """Return the shape of the pixels that the entry came from; empty where it is not known."""
    for name in (f"pixel_values_{entry.kind}s", "pixel_values"):
        shape = entry.arguments.get(name)
        if isinstance(shape, torch.Size):
            return tuple(shape)
    return ()


def _checked(size: Size | None, rows: int, columns: int) -> None:
    if size is not None and not may_have_shape(size, rows, columns):
        raise WrongPictureError(
            f"expected a picture that becomes {rows} rows of {columns} visual tokens, got one of {size[0]} x {size[1]} "
            "pixels"
        )


# Grids of patches that the encoder is told: Qwen2-VL and those built like it.


def told_grid(image: Pictured) -> list[Sheet]:
    """Return the grid of patches `(t, h, w)`, merged in squares and, in some families, in time."""
    entry = image.first
    rows, columns, positions = _told_cells(entry)
    _checked(image.size, rows, columns)
    return frame_sheets(positions.reshape(-1, rows, columns), WHOLE)


def padded_grid(image: Pictured) -> list[Sheet]:
    """Lay out Kimi's tokens: a picture that whole tokens do not fill keeps its scale and is padded right and below."""
    sheets = told_grid(image)
    if image.size is None:
        return sheets
    width, height = image.size
    rows, columns = sheets[0].tokens.shape
    side = 14 * 2
    patch = getattr(image.multimodal.config.vision_config, "patch_size", None)
    merge = getattr(image.multimodal.config.vision_config, "merge_kernel_size", None)
    if isinstance(patch, int) and merge:
        side = patch * merge[0]
    # the scale is 1, or the largest that fills no token more
    scale = min(1.0, columns * side / width, rows * side / height)
    box = 0.0, 0.0, columns * side / (width * scale), rows * side / (height * scale)
    return [replace(sheet, box=box) for sheet in sheets]


def bordered_grid(image: Pictured) -> list[Sheet]:
    """Lay out HunYuan-VL's tokens: a newline after each row, and one token before and one after the image."""
    entry = image.first
    _, height, width = told_row(entry, "image_grid_thw")
    count = len(entry.positions)
    for merge in range(1, 9):
        rows, columns = height // merge, width // merge
        for border in (1, 0):
            if rows and columns and count == rows * (columns + 1) + 2 * border:
                inner = entry.positions[border : count - border].reshape(rows, columns + 1)
                _checked(image.size, rows, columns)
                return [Sheet("picture", inner[:, :-1])]
    raise UnknownGeometryError(f"{count} tokens do not fit a grid of {height} x {width} patches")


def _told_cells(entry: Entry) -> tuple[int, int, np.ndarray]:
    """Return the rows and columns of tokens of a frame, and the tokens."""
    frames, height, width = told_row(entry, f"{entry.kind}_grid_thw")
    count = len(entry.positions)
    merged = frames * height * width // max(1, count)
    for in_time in (1, 2, 4):
        side = math.isqrt(merged // in_time)
        if side and side * side * in_time == merged and not (height % side or width % side or frames % in_time):
            rows, columns = height // side, width // side
            if frames // in_time * rows * columns == count:
                return rows, columns, entry.positions
    raise UnknownGeometryError(f"{count} tokens do not fit a grid of {frames} x {height} x {width} patches")


def frame_sheets(tokens: np.ndarray, box: Box) -> list[Sheet]:
    """Make a sheet for each frame of `[frames, rows, columns]` tokens."""
    count = len(tokens)
    names = ["picture"] if count == 1 else [f"frame {number + 1} of {count}" for number in range(count)]
    return [Sheet(name, grid, box, frame, count) for frame, (name, grid) in enumerate(zip(names, tokens, strict=True))]


# One picture, one entry.


def processor_fit(processor: Any) -> Fit | None:
    """Find how a processor makes a square; None if it does not say."""
    processor = getattr(processor, "image_processor", processor)
    if processor is None or not hasattr(processor, "do_resize"):
        return None
    if getattr(processor, "do_pad", False) and hasattr(processor, "pad_to_square"):
        return letterboxed
    if getattr(processor, "do_center_crop", False):
        resized, cut = (dict(getattr(processor, name, None) or {}) for name in ("size", "crop_size"))
        if resized.get("shortest_edge") and cut.get("height") not in (None, resized["shortest_edge"]):
            return partial(centre_square, share=cut["height"] / resized["shortest_edge"])
        return centre_square
    return stretched


@dataclass(frozen=True)
class OneSquare:
    """The picture becomes one square of tokens.

    Attributes:
        fit: how, as the released processors of the family do it.
    """

    fit: Fit

    def __call__(self, image: Pictured) -> list[Sheet]:
        tokens = square_grid(image.first.positions)
        if image.size is None:
            return [Sheet("picture", tokens)]
        told = processor_fit(image.processor)
        box = (told or self.fit)(image.size)
        if box == WHOLE:
            return [Sheet("picture", tokens)]
        name = "the middle of the picture" if box[0] > 0 or box[1] > 0 else "picture with its padding"
        if told is None:
            name += ", as the usual processors cut it; processor= would tell"
        return [Sheet(name, tokens, box)]


def told_pixels(image: Pictured) -> list[Sheet]:
    """Lay out Pixtral's tokens: the height and width in pixels are told, and a token is a square of them."""
    entry = image.first
    height, width = told_row(entry, "image_sizes")
    count = len(entry.positions)
    rows = max(1, round(height / math.sqrt(height * width / count)))
    if count % rows:
        raise UnknownGeometryError(f"{count} tokens do not fit {height} x {width} pixels")
    _checked(image.size, rows, count // rows)
    return [Sheet("picture", entry.positions.reshape(rows, -1))]


def told_positions(image: Pictured) -> list[Sheet]:
    """Lay out Gemma 4's tokens: the column and row of each patch are told, and tokens are squares of patches."""
    entry = image.first
    name = f"{entry.kind}_position_ids"
    table = entry.arguments.get(name)
    if not isinstance(table, torch.Tensor) or table.dim() != 3:
        raise UnknownGeometryError(f"the encoder was told no {name}")
    first, frames = entry.index, 1
    of_videos = entry.arguments.get("num_frames_per_video")
    if entry.kind == "video" and of_videos is not None:
        counts = [int(count) for count in (of_videos.tolist() if isinstance(of_videos, torch.Tensor) else of_videos)]
        first, frames = sum(counts[: entry.index]), counts[entry.index]
    width, height = (int(last) + 1 for last in table[first].amax(dim=0).tolist())
    count = len(entry.positions) // frames
    side = math.isqrt(width * height // max(1, count))
    if not side or width // side * (height // side) * frames != len(entry.positions):
        raise UnknownGeometryError(f"{count} tokens do not fit a grid of {height} x {width} patches")
    rows, columns = height // side, width // side
    _checked(image.size, rows, columns)
    return frame_sheets(entry.positions.reshape(frames, rows, columns), WHOLE)


# A video in one entry: squares frame by frame.


@dataclass(frozen=True)
class SquareFrames:
    """The frames of a video, each one square of tokens.

    Attributes:
        fit: how a frame becomes a square.
        trailing: tokens after the last frame, such as a newline.
    """

    fit: Fit
    trailing: int = 0

    def __call__(self, video: Pictured) -> list[Sheet]:
        shape = pixel_shape(video.first)
        positions = np.concatenate([entry.positions for entry in video.entries])
        positions = positions[: len(positions) - self.trailing]
        frames = shape[1] if len(shape) == 5 else 0
        if not frames or len(positions) % frames:
            raise UnknownGeometryError(f"{len(positions)} tokens do not fit {frames} frames")
        tokens = np.stack([square_grid(frame) for frame in positions.reshape(frames, -1)])
        return frame_sheets(tokens, WHOLE if video.size is None else self.fit(video.size))


# Tiles.

EntryGrid = Callable[[Entry], np.ndarray]
"""The tokens of an entry as rows and columns."""


def square_entry(entry: Entry) -> np.ndarray:
    """Lay out the tokens of a tile that is one square."""
    return square_grid(entry.positions)


@dataclass(frozen=True)
class ToldShape:
    """A tile whose rows and columns of patches are told; tokens are squares of patches, the last ones cut off or not.

    Attributes:
        names: of the argument that tells, for images and for videos.
    """

    names: tuple[str, str]

    def __call__(self, entry: Entry) -> np.ndarray:
        height, width = told_row(entry, self.names[entry.kind == "video"])
        for side in range(1, 9):
            rows, columns = math.ceil(height / side), math.ceil(width / side)
            if rows * columns == len(entry.positions):
                return entry.positions.reshape(rows, columns)
        raise UnknownGeometryError(f"{len(entry.positions)} tokens do not fit a tile of {height} x {width} patches")


@dataclass(frozen=True)
class Tiled:
    """A picture that is cut into equal tiles, row by row, beside an overview of the whole.

    Attributes:
        overview: which of several entries shows the whole picture, "first" or "last".
        arrange: rows and columns of the tiles, where the text between them does not tell.
        marked: whether text between the tiles tells their rows.
        canvas: what the tiles cover together.
        grid: rows and columns of tokens of a tile.
        keeps_shape: whether a picture that is not cut keeps the ratio of its sides.
    """

    overview: str
    arrange: Arrange
    marked: bool = False
    canvas: Canvas = stretched_canvas
    grid: EntryGrid = square_entry
    keeps_shape: bool = False

    def __call__(self, image: Pictured) -> list[Sheet]:
        entries = list(image.entries)
        shape = pixel_shape(image.first)
        tile = shape[-1] if len(shape) >= 4 else 1
        if len(entries) == 1:
            tokens = self.grid(entries[0])
            if self.keeps_shape:
                _checked(image.size, *tokens.shape)
            box = WHOLE if image.size is None else self.canvas(image.size, (1, 1), tile)
            return [Sheet("picture", tokens, box)]
        whole, tiles = (entries[0], entries[1:]) if self.overview == "first" else (entries[-1], entries[:-1])
        overview = self.grid(whole)
        if self.keeps_shape:
            _checked(image.size, *overview.shape)
        rows, columns = self._arrangement(image, tiles, tile)
        grids = [self.grid(entry) for entry in tiles]
        if len({grid.shape for grid in grids}) > 1:
            raise UnknownGeometryError("its tiles have different numbers of tokens")
        high, wide = grids[0].shape
        tokens = np.stack(grids).reshape(rows, columns, high, wide).swapaxes(1, 2).reshape(rows * high, columns * wide)
        box = WHOLE if image.size is None else self.canvas(image.size, (rows, columns), tile)
        return [Sheet("whole picture", overview), Sheet(f"{rows} x {columns} tiles", tokens, box)]

    def _arrangement(self, image: Pictured, tiles: list[Entry], tile: int) -> Arrangement:
        if self.marked:
            between = [tuple(image.ids[a.positions[-1] + 1 : b.positions[0]].tolist()) for a, b in pairwise(tiles)]
            found = arrangement_by_marks(between)
            if found is not None:
                if image.size is not None and self.arrange is nearest_shape and not may_have_shape(image.size, *found):
                    raise WrongPictureError(
                        f"expected a picture that was cut into {found[0]} rows of {found[1]} tiles, got one of "
                        f"{image.size[0]} x {image.size[1]} pixels"
                    )
                return found
        if len(tiles) == 1:
            return 1, 1
        return self.arrange(image.known_size(), len(tiles), tile)


def split_tiles(layout: Tiled) -> Layout:
    """Apply `layout` to entries that hold several tiles with text between them."""

    def split(image: Pictured) -> list[Sheet]:
        return layout(replace(image, entries=split_at_text(image.entries, image.ids)))

    return split


# Tiles without padding, with newlines.


def any_resolution(image: Pictured) -> list[Sheet]:
    """Lay out LLaVA-NeXT's tokens: the whole picture, then its tiles as one grid without padding, with newlines."""
    from transformers.image_processing_utils import select_best_resolution

    entry, config = image.first, image.multimodal.config
    height, width = told_row(entry, "image_sizes")
    if image.size is not None and not _same_ratio(image.size, (width, height)):
        raise WrongPictureError(
            f"expected a picture of {width} x {height} pixels or the same shape, got one of {image.size[0]} x "
            f"{image.size[1]} pixels"
        )
    size, side = config.vision_config.image_size, config.vision_config.image_size // config.vision_config.patch_size
    whole = Sheet("whole picture", entry.positions[: side * side].reshape(side, side))
    below = entry.positions[side * side :]
    if len(below) <= 1:
        return [replace(whole, name="picture")]
    high, wide = select_best_resolution((height, width), config.image_grid_pinpoints)
    high, wide = high // size, wide // size
    rows, columns = _unpadded(image, side, (high, wide), (height, width), len(below))
    tokens = below.reshape(rows, columns + 1)[:, :-1]
    box = _unpadded_box((width, height), (high, wide), size, side)
    return [whole, Sheet(f"{high} x {wide} tiles", tokens, box)]


def _unpadded(image: Pictured, side: int, tiles: Arrangement, size: tuple[int, int], length: int) -> tuple[int, int]:
    """Return rows and columns of tokens of all tiles together, as the model lays out features of one number each."""
    count = tiles[0] * tiles[1] + 1
    blank = torch.zeros(count, side * side, 1, dtype=torch.float32, device="cpu")
    accepted = inspect.signature(image.multimodal.pack_image_features).parameters
    arguments, config = image.first.arguments, image.multimodal.config
    optional = {
        name: arguments[name] if arguments.get(name) is not None else getattr(config, name, None)
        for name in ("vision_feature_select_strategy", "vision_aspect_ratio")
        if name in accepted
    }
    packed = image.multimodal.pack_image_features([blank], [list(size)], image_newline=blank.new_ones(1), **optional)
    below = packed[0][0][side * side :, 0]
    rows = int((below == 1).sum())
    if len(below) != length or not rows or length % rows:
        raise UnknownGeometryError(f"{length} tokens do not fit {tiles[0]} x {tiles[1]} tiles")
    return rows, length // rows - 1


def _unpadded_box(size: Size, tiles: Arrangement, tile: int, side: int) -> Box:
    """Return the rectangle of the picture that stays when whole tokens of padding are dropped."""
    width, height = size
    high, wide = tiles[0] * tile, tiles[1] * tile
    across, down = wide / width, high / height
    if across < down:
        new_width, new_height = wide, min(math.ceil(height * across), high)
    else:
        new_height, new_width = high, min(math.ceil(width * down), wide)
    rows, columns = tiles[0] * side, tiles[1] * side
    left, top = 0, 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    cell = tile / side
    from_left, from_top = (wide - new_width) // 2, (high - new_height) // 2
    return (
        (left * cell - from_left) / new_width,
        (top * cell - from_top) / new_height,
        ((columns - left) * cell - from_left) / new_width,
        ((rows - top) * cell - from_top) / new_height,
    )


def _same_ratio(one: Size, other: Size) -> bool:
    return math.isclose(one[0] * other[1], one[1] * other[0], rel_tol=0.02)


def resampled(image: Pictured) -> list[Sheet]:
    """Refuse: the tokens are learned queries over the whole picture."""
    raise UnknownGeometryError("each token is a learned query over the whole picture, not a part of it")
