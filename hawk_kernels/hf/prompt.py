"""A prompt on the host: where its visual tokens and its text queries stand, row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One batch of prompts as host arrays, so that every length that follows is known without asking the device.

    Attributes:
        ids: int64 `[B, T]`.
        valid: bool `[B, T]`, False at padding.
        visual: bool `[B, T]`, True at visual placeholders.
        query: bool `[B, T]`, True at the text tokens that rank the visual ones.
        query_sources: for each row where its queries were found.
        length: tokens of a row that are the prompt's own; assisted decoding appends guesses to it.
        separators: bool `[B, T]`, True at visual placeholders between the visual tokens of an image that always stay,
            and that `visual` leaves out; or None.
    """

    ids: np.ndarray
    valid: np.ndarray
    visual: np.ndarray
    query: np.ndarray
    query_sources: list[str]
    length: int
    separators: np.ndarray | None = None

    def with_separators(self, separators: np.ndarray) -> Prompt:
        """The same prompt, where some visual placeholders, bool `[B, T]`, only hold the others together."""
        return replace(self, visual=self.visual & ~separators, separators=separators)

    def ends_in_text(self, columns: int) -> bool:
        """Whether the last `columns` of every row are text, so that they also end a packed row."""
        last = slice(-columns, None)
        return bool((self.valid[:, last] & ~self.visual[:, last]).all())

    def images(self, row: int) -> list[np.ndarray]:
        """Positions of each image or video of a row: runs of one placeholder id."""
        visual = self.visual[row]
        positions = np.flatnonzero(visual if self.separators is None else visual | self.separators[row])
        if positions.size == 0:
            return []
        kinds = self.ids[row, positions]
        starts = (np.diff(positions) != 1) | (np.diff(kinds) != 0)
        return [image[visual[image]] for image in np.split(positions, np.flatnonzero(starts) + 1)]

    def image_lengths(self) -> list[list[int]]:
        """Visual tokens of each image of each row."""
        return [[len(image) for image in self.images(row)] for row in range(len(self.ids))]


def padded_positions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the True entries of each row, ascending, side by side.

    Args:
        mask: bool `[B, T]`.

    Returns:
        int64 `[B, M]`, 0 where a shorter row is padded at its end, and bool `[B, M]`, False there.
    """
    counts = mask.sum(axis=1)
    filled = np.arange(int(counts.max(initial=0))) < counts[:, None]
    positions = np.zeros(filled.shape, dtype=np.int64)
    positions[filled] = np.nonzero(mask)[1]
    return positions, filled
