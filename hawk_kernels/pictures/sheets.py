"""Describes sheets, rectangles of a picture under a grid of visual tokens, and how processors cut such rectangles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Size = tuple[int, int]
"""Width and height of a picture in pixels."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom as fractions of a picture; beyond 0 and 1 where the processor pads it."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class UnknownGeometryError(Exception):
    """Where the tokens of an image stand on the picture cannot be known; the message says why."""


class WrongPictureError(Exception):
    """The caller's picture cannot be the one that was encoded; the message says what was expected, and what came."""


@dataclass(frozen=True)
class Sheet:
    """A grid of visual tokens over a rectangle of a picture.

    Attributes:
        name: what the rectangle is, for a caption.
        tokens: int64 `[rows, columns]`, the places in the prompt of the tokens of the cells; -1 where there is none.
        box: the rectangle, or None where it is not known; the grid then only shows the tokens in their order.
        frame: which frame of a video the sheet is, counted from 0; 0 for a still picture.
        frames: how many sheets share the frames of the video.
    """

    name: str
    tokens: np.ndarray
    box: Box | None = WHOLE
    frame: int = 0
    frames: int = 1


def in_order(positions: np.ndarray, name: str) -> Sheet:
    """Lay out the tokens in their order, row by row, for an image whose geometry is not known."""
    columns = max(1, math.ceil(math.sqrt(len(positions) * 1.5)))
    rows = max(1, math.ceil(len(positions) / columns))
    tokens = np.full(rows * columns, -1, dtype=np.int64)
    tokens[: len(positions)] = positions
    return Sheet(name, tokens.reshape(rows, columns), None)


def square_grid(positions: np.ndarray) -> np.ndarray:
    """Lay out tokens of a square, row by row, int64 `[side, side]`, leaving out a token in front, such as CLS.

    Raises:
        UnknownGeometryError: their number is no square.
    """
    count = len(positions)
    for prefix in (0, 1):
        side = math.isqrt(max(0, count - prefix))
        if side and side * side == count - prefix:
            return positions[prefix:].reshape(side, side)
    raise UnknownGeometryError(f"{count} tokens do not fill a square")


# How a picture of any shape becomes one square.


def stretched(size: Size) -> Box:
    """Return the rectangle under a square to which the whole picture is resized, whatever its shape."""
    return WHOLE


def centre_square(size: Size, share: float = 1.0) -> Box:
    """Return the square in the middle that is cut out, whose side is a share of the shorter side."""
    width, height = size
    side = min(size) * share
    left, top = (width - side) / 2 / width, (height - side) / 2 / height
    return left, top, left + side / width, top + side / height


def letterboxed(size: Size) -> Box:
    """Return the square to which the picture is padded on both sides."""
    width, height = size
    side = max(size)
    left, top = -((side - width) // 2) / width, -((side - height) // 2) / height
    return left, top, left + side / width, top + side / height


# How many tiles stand side by side, of the arrangements that have the number of tiles that was encoded. A processor
# takes the best arrangement of all numbers of tiles; it is then also the best of those with its own number.

Arrangement = tuple[int, int]
"""Rows and columns of tiles."""
Arrange = Callable[[Size, int, int], Arrangement]
"""From the picture, the number of tiles and the side of a tile in pixels to their arrangement."""


def _arrangements(count: int) -> list[Arrangement]:
    """List all arrangements of a number of tiles, those with few columns first."""
    return [(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0]


def closest_ratio(size: Size, count: int, tile: int) -> Arrangement:
    """Choose the closest ratio of sides, as InternVL, Aya Vision and LFM2-VL do.

    Of two equally close ones the later counts where the picture has more than half the pixels of the tiles.

    Raises:
        WrongPictureError: fewer tiles would have been closer.
    """
    width, height = size
    best, least = (1, 1), math.inf
    for rows, columns in _arrangements(count):
        difference = abs(width / height - columns / rows)
        is_large = width * height > 0.5 * tile * tile * count
        if difference < least or (difference == least and is_large):
            best, least = (rows, columns), difference
    for fewer in range(2, count):
        for rows, columns in _arrangements(fewer):
            if abs(width / height - columns / rows) < least:
                raise WrongPictureError(
                    f"expected a picture that is cut into {count} tiles, got one of {width} x {height} pixels, which "
                    f"{rows} x {columns} tiles fit better"
                )
    return best


def least_upscaling(size: Size, count: int, tile: int) -> Arrangement:
    """Choose the least enlargement without cropping, else the least reduction, as Llama 4 and Command A Vision do."""
    width, height = size
    scales = {(r, c): min(c * tile / width, r * tile / height) for r, c in _arrangements(count)}
    enlarging = {grid: scale for grid, scale in scales.items() if scale >= 1}
    if enlarging:
        return min(enlarging, key=lambda grid: enlarging[grid])
    return max(scales, key=lambda grid: scales[grid])


def largest_fit(size: Size, count: int, tile: int) -> Arrangement:
    """Choose the largest picture that fits without being reduced, else the ratio just below, as Perception LM does."""
    width, height = size
    grids = _arrangements(count)
    fitting = [(r, c) for r, c in grids if c * tile >= width and r * tile >= height]
    if fitting:
        return max(fitting, key=lambda grid: (min(grid[1] * tile / width, grid[0] * tile / height), grid[1]))
    below = [(r, c) for r, c in grids if c / r <= width / height]
    above = [(r, c) for r, c in grids if c / r > width / height]
    if (width >= height and below) or not above:
        return max(below, key=lambda grid: grid[1] / grid[0])
    return min(above, key=lambda grid: grid[1] / grid[0])


def nearest_shape(size: Size, count: int, tile: int) -> Arrangement:
    """Choose the shape nearest to the picture's, by the logarithm of the ratio of sides."""
    width, height = size
    return min(_arrangements(count), key=lambda grid: abs(math.log(width / height * grid[0] / grid[1])))


def one_line(size: Size, count: int, tile: int) -> Arrangement:
    """Put the tiles in one line along the longer side, as Gemma 3 pans and scans."""
    return (1, count) if size[0] >= size[1] else (count, 1)


def covering(size: Size, count: int, tile: int) -> Arrangement:
    """Choose Ovis 2's tiles, which show the largest part of the picture without reducing it.

    Its processor in transformers takes the rows of the arrangement that it has found for columns, and the columns for
    rows; this function does the same.
    """
    width, height = size

    def covered(grid: Arrangement) -> float:
        rows, columns = grid
        row_height, column_width = height // rows, width // columns
        total = 0.0
        for row in range(rows):
            for column in range(columns):
                w = width - column * column_width if column == columns - 1 else column_width
                h = height - row * row_height if row == rows - 1 else row_height
                longer, shorter = max(w, h), min(w, h)
                total += tile * (shorter / longer * tile) if longer > tile else longer * shorter
        return total

    # the processor lists arrangements with few rows first
    grids = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    rows, columns = max(grids, key=covered)
    return columns, rows


def arrangement_by_marks(between: Sequence[tuple[int, ...]]) -> Arrangement | None:
    """Read rows and columns of tiles off the text between them; None where that does not tell.

    Processors set something else between rows than within one: one token more, or another one.

    Args:
        between: the ids between each tile and the next.
    """
    lengths = [len(ids) for ids in between]
    marks: Sequence[object] = lengths if len(set(lengths)) > 1 else between
    count = len(between) + 1
    for rows, columns in _arrangements(count):
        if rows == 1 or columns == 1:
            continue
        ends = {mark for place, mark in enumerate(marks) if (place + 1) % columns == 0}
        inner = {mark for place, mark in enumerate(marks) if (place + 1) % columns}
        if len(ends) == 1 and len(inner) == 1 and ends != inner:
            return rows, columns
    return None


# What the tiles together cover.

Canvas = Callable[[Size, Arrangement, int], Box]
"""From the picture, the arrangement and the side of a tile in pixels to the rectangle that the tiles cover."""


def stretched_canvas(size: Size, grid: Arrangement, tile: int) -> Box:
    """Return the whole picture, which is resized to the size of all tiles."""
    return WHOLE


def crops_canvas(size: Size, grid: Arrangement, tile: int) -> Box:
    """Return what Gemma 3's equal crops cover: a pixel or two beyond the picture where its side is no multiple."""
    width, height = size
    rows, columns = grid
    return 0.0, 0.0, math.ceil(width / columns) * columns / width, math.ceil(height / rows) * rows / height


def cornered_canvas(size: Size, grid: Arrangement, tile: int) -> Box:
    """Return what Llama 4's tiles cover: the picture is in the upper left corner, enlarged to one tile at most."""
    width, height = size
    target_height, target_width = grid[0] * tile, grid[1] * tile
    room_height, room_width = min(max(height, tile), target_height), min(max(width, tile), target_width)
    across, down = room_width / width, room_height / height
    if across < down:
        new_width, new_height = room_width, min(math.floor(height * across), room_height)
    else:
        new_height, new_width = room_height, min(math.floor(width * down), room_width)
    return 0.0, 0.0, target_width / max(1, new_width), target_height / max(1, new_height)


def may_have_shape(size: Size, rows: float, columns: float) -> bool:
    """Tell whether a picture may have become `rows` x `columns` equal cells, each side rounded by less than a cell."""
    width, height = size
    low = (columns - 1) / (rows + 1)
    high = (columns + 1) / (rows - 1) if rows > 1 else math.inf
    return low <= width / height <= high
