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
        places: number of its placeholders there, `K`.
        frames, height, width: its grid of visual tokens.
        seconds: how far two frames are apart, in steps of the first axis.
    """

    offset: int
    places: int
    frames: int
    height: int
    width: int
    seconds: float = 1.0


def media_positions(frames: int, height: int, width: int, seconds: float = 1.0) -> NDArray[np.int64]:
    """List the positions of all tokens of a picture or video, counted from its corner, int64 `[tokens, 3]`."""
    grid = np.indices((frames, height, width), dtype=np.int64).reshape(3, -1)
    grid[0] = (grid[0] * seconds).astype(np.int64)
    return np.ascontiguousarray(grid.T)


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
        # transformers goes on after the longer side, for videos too
        position += max(item.height, item.width)
    positions[:, done:] = np.arange(position, position + length - done)
    return positions, position - done
