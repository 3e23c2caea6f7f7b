"""Which text of a prompt asks about its images."""

from __future__ import annotations

import numpy as np

AFTER_LAST_VISUAL = "text after the last visual token"
ALL_TEXT = "all text after the first token, because none follows the last visual token"
GIVEN = "given by query="
NO_VISUAL = "none, no visual tokens"


def text_queries(
    ids: np.ndarray,
    valid: np.ndarray,
    visual: np.ndarray,
    vision_end_id: int | None,
    end_of_turn_ids: tuple[int, ...],
) -> tuple[np.ndarray, list[str]]:
    """The text tokens that rank the visual ones, and for each row where they were found.

    Those after the last vision-end token (or the last visual token) up to the final end-of-turn token, exclusive. A row
    without such text (the question came before the image) takes all its text after the first token.

    Args:
        ids: int `[B, T]`.
        valid: bool `[B, T]`, False at padding.
        visual: bool `[B, T]`.
        vision_end_id: id of the token that closes an image, or None.
        end_of_turn_ids: ids that end a turn.

    Returns:
        bool `[B, T]` and one description a row.
    """
    batch, length = ids.shape
    position = np.arange(length)
    queries = np.zeros((batch, length), dtype=bool)
    found = []
    opens = visual if vision_end_id is None else visual | ((ids == vision_end_id) & valid)
    ends = np.isin(ids, end_of_turn_ids) & valid
    for row in range(batch):
        if not visual[row].any():
            found.append(NO_VISUAL)
            continue
        start = np.flatnonzero(opens[row])[-1] + 1
        turn_ends = np.flatnonzero(ends[row])
        stop = turn_ends[-1] if turn_ends.size and turn_ends[-1] >= start else length
        asked = valid[row] & (position >= start) & (position < stop)
        found.append(AFTER_LAST_VISUAL if asked.any() else ALL_TEXT)
        if not asked.any():
            asked = valid[row] & ~visual[row]
            asked &= position != np.argmax(valid[row])
        queries[row] = asked
    return queries, found
