"""Which text of a prompt asks about its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial

import numpy as np

AFTER_LAST_VISUAL = "text after the last visual token"
LAST_TURN = "last user turn after the last visual token"
ALL_TEXT = "all text after the first token, because none follows the last visual token"
ALL_TEXT_SINCE_IMAGE_TURN = "all text from the turn of the first image on, because none follows the last visual token"
GIVEN = "given by query="
NO_VISUAL = "none, no visual tokens"

_LONGEST_OPENING = 16


@dataclass(frozen=True)
class Markers:
    """Token ids that give a conversation its structure.

    Attributes:
        vision_ends: close an image or a video.
        turn_ends: close a turn of either side.
        reply_ends: close a reply, where nothing closes a question: what follows is the next question.
    """

    vision_ends: tuple[int, ...] = ()
    turn_ends: tuple[int, ...] = ()
    reply_ends: tuple[int, ...] = ()


def text_queries(
    ids: np.ndarray, valid: np.ndarray, visual: np.ndarray, markers: Markers
) -> tuple[np.ndarray, list[str]]:
    """The text tokens that rank the visual ones, and for each row where they were found.

    Those after the last visual token (or the token that closes the image) up to the final end of turn, exclusive; of
    several turns there the user's last. A row without such text (the question came before the image) takes all its text
    after the first token, without turns that had ended before the first image, such as a system prompt.

    Args:
        ids: int `[B, T]`.
        valid: bool `[B, T]`, False at padding.
        visual: bool `[B, T]`.
        markers: ids that close images and turns.

    Returns:
        bool `[B, T]` and one description a row.
    """
    queries = np.zeros(ids.shape, dtype=bool)
    found = []
    for row in range(len(ids)):
        if not visual[row].any():
            found.append(NO_VISUAL)
            continue
        asked, source = _question(ids[row], valid[row], visual[row], markers)
        queries[row, asked] = True
        found.append(source)
    return queries, found


def _question(ids: np.ndarray, valid: np.ndarray, visual: np.ndarray, markers: Markers) -> tuple[np.ndarray, str]:
    """Positions of the question of one row, and where they were found."""
    closed = visual | (np.isin(ids, markers.vision_ends) & valid)
    start = np.flatnonzero(closed)[-1] + 1
    following = start + np.flatnonzero(valid[start:])
    opening = partial(_opening, ids, valid, visual, markers)
    asked, is_one_of_several = _last_question(ids, following, opening, markers)
    if asked.size:
        return asked, LAST_TURN if is_one_of_several else AFTER_LAST_VISUAL
    text = np.flatnonzero(valid & ~visual & (np.arange(ids.size) != np.argmax(valid)))
    before = np.flatnonzero(valid[: np.argmax(visual)])
    ends = before[np.isin(ids[before], markers.turn_ends + markers.reply_ends)]
    if ends.size and text[text > ends[-1]].size:
        return text[text > ends[-1]], ALL_TEXT_SINCE_IMAGE_TURN
    return text, ALL_TEXT


def _opening(ids: np.ndarray, valid: np.ndarray, visual: np.ndarray, markers: Markers) -> np.ndarray:
    """Positions from the start of the last image's turn on, before its images: how a template opens a user's turn."""
    text_or_end = np.flatnonzero(valid[: np.flatnonzero(visual)[-1]])
    *_, turn = _split(ids, text_or_end, markers.turn_ends + markers.reply_ends)
    return turn[: min(_LONGEST_OPENING, int(np.argmax(np.append(visual[turn], True))))]


def _last_question(
    ids: np.ndarray, positions: np.ndarray, opening: Callable[[], np.ndarray], markers: Markers
) -> tuple[np.ndarray, bool]:
    """What the user said last at `positions`, and whether other turns stand there too."""
    exchanges = [exchange for exchange in _split(ids, positions, markers.reply_ends) if exchange.size]
    if not exchanges:
        return positions[:0], False
    *turns, rest = _split(ids, exchanges[-1], markers.turn_ends)
    if not turns:
        return rest, len(exchanges) > 1
    if len(turns) % 2 == 1:
        last = turns[-1]
    elif rest.size <= 1:
        # behind a reply nothing but a line break: none is asked for
        last = turns[-2]
    else:
        # a question that is not closed yet, or the second of two in a row and the opening of a reply
        closed, unclosed = (_likeness(ids, opening(), piece) for piece in (turns[-1], rest))
        last = rest if unclosed > closed or (unclosed == closed and turns[0].size) else turns[-1]
    return last, len(exchanges) > 1 or len(turns) > 1


def _likeness(ids: np.ndarray, opening: np.ndarray, piece: np.ndarray) -> int:
    """Tokens in a row that a piece of a prompt begins with as a user's turn does; one alone is chance."""
    # a line break may come first or be missing
    start = piece[: opening.size + 1]
    matcher = SequenceMatcher(None, ids[opening].tolist(), ids[start].tolist(), autojunk=False)
    size = matcher.find_longest_match().size
    return size if size > 1 else 0


def _split(ids: np.ndarray, positions: np.ndarray, ends: tuple[int, ...]) -> list[np.ndarray]:
    """`positions` between the `ends`, which belong to none; the last piece is what follows the final end."""
    at = np.flatnonzero(np.isin(ids[positions], ends))
    first, *others = np.split(positions, at)
    return [first, *(piece[1:] for piece in others)]
