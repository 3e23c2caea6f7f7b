"""What the visual tokens of an image stand for: cells of a grid, or separators between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Piece:
    """Successive visual tokens: one tile, image or frame, or what stands between two of these.

    Attributes:
        grid: `(t, h, w)` of the tokens that the encoder made, in their order; None where it made none of them.
        is_separator: bool `[tokens]`, True where a token is not a cell of the grid, such as an image newline.
    """

    grid: Grid | None
    is_separator: np.ndarray

    @classmethod
    def of_cells(cls, height: int, width: int) -> Piece:
        """Make a grid of one frame and nothing else."""
        return cls((1, height, width), np.zeros(height * width, dtype=bool))

    @classmethod
    def of_separators(cls, count: int) -> Piece:
        """Make tokens without a cell."""
        return cls(None, np.ones(count, dtype=bool))


def num_tokens(pieces: Sequence[Piece]) -> int:
    """Count the visual tokens of successive pieces."""
    return sum(len(piece.is_separator) for piece in pieces)


def num_cells(pieces: Sequence[Piece]) -> int:
    """Count the visual tokens of successive pieces that the encoder made."""
    return sum(math.prod(piece.grid) for piece in pieces if piece.grid is not None)
