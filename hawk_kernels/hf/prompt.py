"""A prompt on the host: where its visual tokens and its text queries stand, row by row."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """One batch of prompts as host arrays, so that every length that follows is known without asking the device.

    Attributes:
        ids: int64 `[B, T]`.
        valid: bool `[B, T]`, False at padding and at tokens that the caller hides.
        visual: bool `[B, T]`, True at visual tokens that may be dropped.
        query: bool `[B, T]`, True at the text tokens that rank the visual ones.
        query_sources: for each row where its queries were found.
        length: tokens of a row that are the prompt's own; assisted decoding appends guesses to it.
        placeholders: bool `[B, T]`, True wherever a feature of an image or video stands: at `visual`, at what the
            caller hides, and at what only separates the visual tokens of an image. None: at `visual` alone.
        starts: bool `[B, T]`, True at the first placeholder of each image or video. None: each run of one placeholder
            id is one.
    """

    ids: np.ndarray
    valid: np.ndarray
    visual: np.ndarray
    query: np.ndarray
    query_sources: list[str]
    length: int
    placeholders: np.ndarray | None = None
    starts: np.ndarray | None = None

    def all_placeholders(self) -> np.ndarray:
        """Where features of images and videos stand, bool `[B, T]`."""
        return self.visual if self.placeholders is None else self.placeholders

    def with_separators(self, separators: np.ndarray) -> Prompt:
        """The same prompt, where some visual placeholders, bool `[B, T]`, only hold the others together."""
        return replace(self, visual=self.visual & ~separators, placeholders=self.all_placeholders())

    def with_images(self, lengths: dict[str, list[int]], kinds: dict[int, str]) -> Prompt:
        """The same prompt, whose images and videos are those of the encoder, whatever stands between their tokens.

        Args:
            lengths: visual tokens of each image and of each video, by kind, in their order; for each sample several
                equal rows where `generate` repeats it.
            kinds: kind of each placeholder id.

        Returns:
            a prompt with `starts`, or this one where the lengths do not fit its placeholders.
        """
        placeholders = self.all_placeholders()
        copies = self.copies_of_rows(sum(map(sum, lengths.values())))
        waiting = {kind: deque(of_kind) for kind, of_kind in lengths.items()}
        starts = np.zeros_like(placeholders)
        for row in range(0, len(self.ids), copies):
            positions = np.flatnonzero(placeholders[row])
            while positions.size:
                first = self.ids[row, positions[0]]
                # some models mark the frames of a video as images
                queue = waiting.get(kinds[int(first)]) or next((other for other in waiting.values() if other), None)
                length = queue.popleft() if queue else 0
                if not 0 < length <= positions.size or (self.ids[row, positions[:length]] != first).any():
                    return self
                starts[row : row + copies, positions[0]] = True
                positions = positions[length:]
        return self if any(waiting.values()) else replace(self, starts=starts)

    def copies_of_rows(self, encoded: int) -> int:
        """How many equal rows in succession stand for a sample, where `encoded` visual tokens serve the whole batch."""
        copies = int(self.all_placeholders().sum()) // max(1, encoded)
        if copies < 2 or len(self.ids) % copies:
            return 1
        of_samples = self.ids.reshape(-1, copies, self.ids.shape[1])
        return copies if (of_samples == of_samples[:, :1]).all() else 1

    def ends_in_text(self, columns: int) -> bool:
        """Whether the last `columns` of every row are text, so that they also end a packed row."""
        last = slice(-columns, None)
        return bool((self.valid[:, last] & ~self.visual[:, last]).all())

    def whole_images(self, row: int) -> list[np.ndarray]:
        """Positions of the placeholders of each image or video of a row."""
        positions = np.flatnonzero(self.all_placeholders()[row])
        if positions.size == 0:
            return []
        if self.starts is None:
            begins = (np.diff(positions) != 1) | (np.diff(self.ids[row, positions]) != 0)
        else:
            begins = self.starts[row, positions[1:]]
        return np.split(positions, np.flatnonzero(begins) + 1)

    def images(self, row: int) -> list[np.ndarray]:
        """Positions of the visual tokens of each image or video of a row; none of an image that is hidden."""
        return [image[self.visual[row, image]] for image in self.whole_images(row)]

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
