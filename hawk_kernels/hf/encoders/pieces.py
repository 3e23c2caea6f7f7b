"""What the visual tokens of an image stand for: cells of a grid, and separators between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Piece:
    """Successive visual tokens: one tile, image or frame, or what stands between such.

    Attributes:
        grid: `(t, h, w)` of the tokens that the encoder made, in their order; None where it made none of these.
        is_separator: bool `[tokens]`, True where a token is no cell of the grid, such as an image newline.
    """

    grid: Grid | None
    is_separator: np.ndarray

    @classmethod
    def of_cells(cls, height: int, width: int) -> Piece:
        """A grid of one frame and nothing else."""
        return cls((1, height, width), np.zeros(height * width, dtype=bool))

    @classmethod
    def of_separators(cls, count: int) -> Piece:
        """Tokens without a cell."""
        return cls(None, np.ones(count, dtype=bool))


def num_tokens(pieces: Sequence[Piece]) -> int:
    """Visual tokens of successive pieces."""
    return sum(len(piece.is_separator) for piece in pieces)


def num_cells(pieces: Sequence[Piece]) -> int:
    """Those of them that the encoder made."""
    return sum(math.prod(piece.grid) for piece in pieces if piece.grid is not None)
