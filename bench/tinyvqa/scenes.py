"""What stands where: pages of cells without a blank one, digits among shapes.

A cell is 28 x 28 pixels, which is exactly one visual token of Qwen2.5-VL (patch 14, merge 2), so what a pruning method
keeps can be checked cell by cell. A prompt shows one picture, several, or a short video; its pages have one size.

Within a prompt no digit occurs twice, no two digits share a colour, and some shapes, its landmarks, occur once, so
every question has one answer. All other cells are filled with the remaining shapes, in any colour, so that neither a
colour nor "not blank" gives a digit away.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.tinyvqa.digits import DigitPool

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 45, 45),
    "green": (45, 185, 65),
    "blue": (60, 100, 250),
    "yellow": (245, 220, 50),
    "purple": (150, 60, 205),
    "orange": (250, 145, 30),
    "cyan": (60, 220, 235),
    "white": (240, 240, 240),
}
COLOUR_NAMES = tuple(COLOURS)
SHAPE_NAMES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "bar")
TEXTURE_NAMES = ("plain", "rows", "columns", "slopes", "checks", "dots")
MEDIA = ("image", "images", "video")

NUM_DIGITS = 10
MOST_LANDMARKS = 3
_ATTEMPTS = 1000


@dataclass(frozen=True)
class Layout:
    """How a prompt is laid out: `pages` pages of `height x width` cells, shown as a `medium` of `MEDIA`.

    The pages of "images" are pictures of their own; those of "video" follow each other, two frames each (one temporal
    patch of Qwen2.5-VL).
    """

    height: int
    width: int
    pages: int = 1
    medium: str = "image"

    def __post_init__(self) -> None:
        if self.medium not in MEDIA:
            raise ValueError(f"medium: expected one of {MEDIA}, got {self.medium!r}.")
        if self.pages < 1 or (self.medium == "image" and self.pages != 1):
            raise ValueError(f"pages: expected 1 of an 'image' and at least 1 of others, got {self.pages}.")
        if min(self.height, self.width) < 3:
            raise ValueError(f"a page takes at least 3 x 3 cells, got {self.height} x {self.width}.")

    @property
    def cells(self) -> int:
        """Cells of all pages, which is the number of visual tokens."""
        return self.pages * self.height * self.width

    @property
    def landmarks(self) -> int:
        """How many shapes occur once; there are twice as many digits."""
        return min(MOST_LANDMARKS, max(1, self.cells // 8))

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}"
        return size if self.medium == "image" else f"{self.pages} x {size} {self.medium}"


@dataclass(frozen=True)
class Scene:
    """Contents of all cells, page by page and row by row.

    Attributes:
        layout: of the pages.
        figures: int64 `[cells]`, a digit 0..9, or 10 + the index of a shape in `SHAPE_NAMES`.
        colours: int64 `[cells]`, indices into `COLOUR_NAMES`.
        textures: int64 `[cells]`, indices into `TEXTURE_NAMES`.
        instances: int64 `[cells]`, which glyph of the pool a digit is painted with, -1 for shapes.
        landmarks: cells of the shapes that occur once.
    """

    layout: Layout
    figures: np.ndarray
    colours: np.ndarray
    textures: np.ndarray
    instances: np.ndarray
    landmarks: tuple[int, ...]

    @property
    def digit_cells(self) -> np.ndarray:
        """Where the digits are, ascending."""
        return np.flatnonzero(self.figures < NUM_DIGITS)


def draw_scene(rng: np.random.Generator, pool: DigitPool, layout: Layout) -> Scene:
    """Draw a scene of this layout, with digits of `pool`."""
    cells, landmarks = _place(rng, layout)
    figures = np.full(layout.cells, -1)
    colours = rng.integers(len(COLOURS), size=layout.cells)
    figures[cells] = digits = rng.permutation(NUM_DIGITS)[: len(cells)]
    colours[cells] = rng.permutation(len(COLOURS))[: len(cells)]
    shapes = NUM_DIGITS + rng.permutation(len(SHAPE_NAMES))
    figures[landmarks] = shapes[: len(landmarks)]
    free = figures < 0
    figures[free] = rng.choice(shapes[len(landmarks) :], int(free.sum()))

    instances = np.full(layout.cells, -1)
    for cell, digit in zip(cells, digits, strict=True):
        instances[cell] = rng.choice(pool.of_label(int(digit)))
    textures = rng.integers(len(TEXTURE_NAMES), size=layout.cells)
    return Scene(layout, figures, colours, textures, instances, tuple(landmarks.tolist()))


def draw_patchwork(rng: np.random.Generator, pool: DigitPool, layout: Layout) -> Scene:
    """Draw a scene without order, half of it digits: for learning what things look like, not for questions."""
    instances = rng.integers(len(pool.labels), size=layout.cells)
    is_digit = rng.random(layout.cells) < 0.6
    figures = np.where(is_digit, pool.labels[instances], NUM_DIGITS + rng.integers(len(SHAPE_NAMES), size=layout.cells))
    colours = rng.integers(len(COLOURS), size=layout.cells)
    textures = rng.integers(len(TEXTURE_NAMES), size=layout.cells)
    return Scene(layout, figures, colours, textures, np.where(is_digit, instances, -1), ())


def _place(rng: np.random.Generator, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Place the digits and landmarks; on a single page, at least one edge has exactly one digit nearest to it."""
    for _ in range(_ATTEMPTS):
        cells = rng.permutation(layout.cells)[: 3 * layout.landmarks]
        digits, landmarks = cells[: 2 * layout.landmarks], cells[2 * layout.landmarks :]
        if layout.pages > 1 or extremes(digits, layout):
            return digits, landmarks
    raise RuntimeError(f"no place for {2 * layout.landmarks} digits on {layout}.")


def extremes(cells: np.ndarray, layout: Layout) -> dict[str, int]:
    """Return which of `cells` is nearest to each edge of a single page, if it is one cell alone."""
    rows, columns = cells // layout.width, cells % layout.width
    found = {}
    for edge, distance in (("top", rows), ("bottom", -rows), ("left", columns), ("right", -columns)):
        nearest = np.flatnonzero(distance == distance.min())
        if len(nearest) == 1:
            found[edge] = int(cells[nearest[0]])
    return found
