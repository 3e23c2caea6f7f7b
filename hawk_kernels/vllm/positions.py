"""Positions (t, h, w) of the tokens of a pruned prompt: each keeps the position that it has in the whole prompt.

So text stands where it stands without pruning, whatever was kept, and positions of text are right from the start.
vLLM's own pruning moves the text after a picture by the picture's width, which is wrong for a tall picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Media(NamedTuple):
    """A picture or video in a prompt.

    Attributes:
        offset: index of its first placeholder in the pruned prompt.
        places: number of its placeholders there.
        frames, height, width: its grid of visual tokens.
        seconds: how far two frames are apart, in steps of the first axis.
        texts: number of text tokens between its frames, which are then laid out like pictures. 0 means that no text
            stands between them.
    """

    offset: int
    places: int
    frames: int
    height: int
    width: int
    seconds: float = 1.0
    texts: int = 0

    @property
    def extent(self) -> int:
        """Count the steps from its corner to the text after it."""
        side = max(self.height, self.width)
        # without texts, transformers goes on after the longer side, for videos too
        return self.texts + self.frames * side if self.texts else side


def media_positions(frames: int, height: int, width: int, seconds: float = 1.0) -> NDArray[np.int64]:
    """List the positions of all tokens of a picture or video, counted from its corner, int64 `[tokens, 3]`."""
    grid = np.indices((frames, height, width), dtype=np.int64).reshape(3, -1)
    # in float32, as transformers does, in which a product can be a whole number where the exact one is just below it
    grid[0] = (grid[0].astype(np.float32) * np.float32(seconds)).astype(np.int64)
    return np.ascontiguousarray(grid.T)


def positions_among_texts(visual: NDArray[np.bool_], height: int, width: int) -> NDArray[np.int64]:
    """List the positions of a video with texts between its frames, counted from its first token, int64 `[tokens, 3]`.

    Args:
        visual: bool `[tokens]`, False at text.
        height, width: grid of a frame.
    """
    counted = visual.astype(np.int64)
    before: NDArray[np.int64] = counted.cumsum() - counted
    texts = np.arange(len(counted)) - before
    frame, cell = np.divmod(before, height * width)
    corner = texts + frame * max(height, width)
    within = np.stack([np.zeros_like(cell), cell // width, cell % width], axis=1)
    positions: NDArray[np.int64] = corner[:, None] + within * counted[:, None]
    return positions


def prompt_positions(length: int, media: Iterable[Media]) -> tuple[NDArray[np.int64], int]:
    """Lay out the positions of a pruned prompt, the text of which is final.

    Args:
        length: tokens of the pruned prompt.
        media: its pictures and videos.

    Returns:
        int64 `[3, length]`, where each placeholder stands at the corner of its picture until its token is chosen; and
        what is added to the index of a token after the prompt to get its position.
    """
    positions = np.empty((3, length), dtype=np.int64)
    done = position = 0
    for item in sorted(media):
        text = item.offset - done
        positions[:, done : item.offset] = np.arange(position, position + text)
        position += text
        done = item.offset + item.places
        positions[:, item.offset : done] = position
        position += item.extent
    positions[:, done:] = np.arange(position, position + length - done)
    return positions, position - done
