"""Which text of a prompt asks about its images: by token ids that close images and turns, or by a chat template."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from typing import Any

import numpy as np
import torch

from hawk_kernels.hf.families import KNOWN_VISION_ENDS, PUBLIC_VOCABULARY, REPLY_ENDS, VISION_ENDS

Query = str | torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
"""What a caller may pass as `query=`: a name, a bool mask `[B, T]`, or a callable from `input_ids` to one."""

AFTER_LAST_VISUAL = "text after the last visual token"
LAST_TURN = "last user turn after the last visual token"
ALL_TEXT = "all text after the first token, because none follows the last visual token"
ALL_TEXT_SINCE_IMAGE_TURN = "all text from the turn of the first image on, because none follows the last visual token"
AS_RELEASED = "all text between the last image and the final end of turn, as in the release of HAWK"
GIVEN = "given by query="
NO_VISUAL = "none, no visual tokens"

_LONGEST_OPENING = 16
_QUESTION, _REPLY, _LAST_QUESTION = "hawkfirstquestion", "hawkreply", "hawklastquestion"


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


def find_markers(model: Any, turn_ends: tuple[int, ...] = ()) -> Markers:
    """Find the ids of a model, in its configs and in what is known of public tokenizers.

    Args:
        model: has `config` and, usually, `generation_config`.
        turn_ends: ids that end a turn besides the end-of-sequence ids.
    """
    config = model.config
    text = config.get_text_config()
    is_public = getattr(text, "vocab_size", 0) >= PUBLIC_VOCABULARY
    vision_ends = [getattr(config, name, None) for name in VISION_ENDS]
    vision_ends.append(KNOWN_VISION_ENDS.get(getattr(config, "image_token_id", -1)) if is_public else None)
    sources = (getattr(model, "generation_config", None), config, text)
    ends = dict.fromkeys([*turn_ends, *(end for source in sources for end in _ids(source, "eos_token_id"))])
    reply_ends = tuple(end for end in ends if is_public and end in REPLY_ENDS)
    return Markers(
        vision_ends=tuple(dict.fromkeys(end for end in vision_ends if end is not None)),
        turn_ends=tuple(end for end in ends if end not in reply_ends),
        reply_ends=reply_ends,
    )


def text_queries(
    ids: np.ndarray, valid: np.ndarray, visual: np.ndarray, markers: Markers
) -> tuple[np.ndarray, list[str]]:
    """Find the text tokens that rank the visual ones.

    These are the tokens after the last visual token (or after the token that closes the image) up to the final end of
    turn, exclusive; where several turns stand there, those of the user's last turn. A row without such text, because
    the question came before the image, takes all its text after the first token, without turns that had ended before
    the first image, such as a system prompt.

    Args:
        ids: int `[B, T]`.
        valid: bool `[B, T]`, False at padding.
        visual: bool `[B, T]`.
        markers: ids that close images and turns.

    Returns:
        bool `[B, T]`, and for each row a description of where they were found.
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


def released_queries(
    ids: np.ndarray, valid: np.ndarray, visual: np.ndarray, markers: Markers
) -> tuple[np.ndarray, list[str]]:
    """Find the text tokens that HAWK's release ranks by.

    These are all tokens after the last visual token (or after the token that closes the image) up to the final end of
    turn, exclusive, or up to the end where no turn ends there. Unlike `text_queries`, this takes every turn that
    follows the image, replies and the tokens that open and close turns included, and a row without text after the image
    has none.

    Args:
        ids, valid, visual, markers: as in `text_queries`.

    Returns:
        bool `[B, T]`, and for each row a description of where they were found.
    """
    queries = np.zeros(ids.shape, dtype=bool)
    for row in np.flatnonzero(visual.any(axis=1)):
        after = _after_images(ids[row], valid[row], visual[row], markers)
        ends = np.flatnonzero(np.isin(ids[row, after], markers.turn_ends + markers.reply_ends))
        queries[row, after[: ends[-1]] if ends.size else after] = True
    return queries, [AS_RELEASED if row.any() else NO_VISUAL for row in visual]


NAMED_QUERIES = {"release": released_queries}
"""The function that finds the text queries, for each name that a caller may pass as `query=`."""


class ChatQuestion:
    """Marks the user's last turn: a `query=` for `prune`, made from a processor or tokenizer with a chat template.

    In that turn it marks the words after the last special token that any words follow. These are the words after the
    images or, where none follow, the words before them. Special tokens are never marked.

    Args:
        processor: has `apply_chat_template`; its tokenizer reads the ids.

    Raises:
        ValueError: there is no chat template, or it does not show where a user's turn begins.
    """

    def __init__(self, processor: Any) -> None:
        self._tokenizer = getattr(processor, "tokenizer", processor)
        rendered = _conversation(processor)
        places = [rendered.find(word) for word in (_QUESTION, _REPLY, _LAST_QUESTION)]
        if -1 in places or places != sorted(places):
            raise ValueError(
                "query: expected a chat template that writes questions and replies in their order, got one that does "
                "not; pass a bool mask [B, T] or a callable instead"
            )
        before, rest = rendered.split(_QUESTION, 1)
        reply_opens, rest = rest.split(_REPLY, 1)
        question_opens, closes = rest.split(_LAST_QUESTION, 1)
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._special |= set(self._tokenizer.all_special_ids)
        shared = _common_start(self._units(before)[::-1], self._units(question_opens)[::-1])
        self._opens = "".join(shared[::-1])
        self._closes = "".join(_common_start(self._units(reply_opens), self._units(closes)))
        if not self._opens:
            raise ValueError(
                "query: expected a chat template that marks where a user's turn begins, got one that writes nothing "
                "there; pass a bool mask [B, T] or a callable instead"
            )

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Mark the text of each row's last question: bool `[B, T]` for `input_ids`, int64 `[B, T]`."""
        mask = torch.zeros(input_ids.shape, dtype=torch.bool)
        for row, ids in enumerate(input_ids.tolist()):
            mask[row, self._question(ids)] = True
        return mask.to(input_ids.device)

    def _units(self, text: str) -> list[str]:
        """Split `text` into special tokens and single characters."""
        specials = sorted(self._tokenizer.convert_ids_to_tokens(sorted(self._special)), key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, specials))})", text) if specials else [text]
        return [unit for i, piece in enumerate(pieces) for unit in ([piece] if i % 2 else _bare(piece))]

    def _question(self, ids: list[int]) -> list[int]:
        spelled = {token_id: _bare(self._tokenizer.decode([token_id])) for token_id in set(ids)}
        pieces = [spelled[token_id] for token_id in ids]
        text = "".join(pieces)
        start = text.rfind(self._opens)
        if start < 0:
            return []
        start += len(self._opens)
        stop = text.find(self._closes, start) if self._closes else -1
        stop = len(text) if stop < 0 else stop
        turn, begin = [], 0
        for position, piece in enumerate(pieces):
            if start <= begin and begin + len(piece) <= stop:
                turn.append(position)
            begin += len(piece)
        words = [position for position in turn if ids[position] not in self._special and pieces[position]]
        specials = [position for position in turn if ids[position] in self._special]
        last = max((special for special in specials if words and special < words[-1]), default=-1)
        return [position for position in words if position > last]


def _question(ids: np.ndarray, valid: np.ndarray, visual: np.ndarray, markers: Markers) -> tuple[np.ndarray, str]:
    """Find the positions of one row's question, and describe where they were found."""
    following = _after_images(ids, valid, visual, markers)
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


def _after_images(ids: np.ndarray, valid: np.ndarray, visual: np.ndarray, markers: Markers) -> np.ndarray:
    """Find the positions of one row's tokens after the last image and what closes it."""
    closed = visual | (np.isin(ids, markers.vision_ends) & valid)
    start = np.flatnonzero(closed)[-1] + 1
    following: np.ndarray = start + np.flatnonzero(valid[start:])
    return following


def _opening(ids: np.ndarray, valid: np.ndarray, visual: np.ndarray, markers: Markers) -> np.ndarray:
    """Find how the template opens a user's turn: the positions that open the last image's turn, before its images."""
    text_or_end = np.flatnonzero(valid[: np.flatnonzero(visual)[-1]])
    *_, turn = _split(ids, text_or_end, markers.turn_ends + markers.reply_ends)
    return turn[: min(_LONGEST_OPENING, int(np.argmax(np.append(visual[turn], True))))]


def _last_question(
    ids: np.ndarray, positions: np.ndarray, opening: Callable[[], np.ndarray], markers: Markers
) -> tuple[np.ndarray, bool]:
    """Find what the user said last at `positions`, and whether other turns stand there too."""
    exchanges = [exchange for exchange in _split(ids, positions, markers.reply_ends) if exchange.size]
    if not exchanges:
        return positions[:0], False
    *turns, rest = _split(ids, exchanges[-1], markers.turn_ends)
    if not turns:
        return rest, len(exchanges) > 1
    if len(turns) % 2 == 1:
        last = turns[-1]
    elif rest.size <= 1:
        # only a line break follows the last turn, so that turn is a reply and the one before it the question
        last = turns[-2]
    else:
        # either the rest is a question that nothing closes yet, or it opens a reply to the second of two questions
        closed, unclosed = (_likeness(ids, opening(), piece) for piece in (turns[-1], rest))
        last = rest if unclosed > closed or (unclosed == closed and turns[0].size) else turns[-1]
    return last, len(exchanges) > 1 or len(turns) > 1


def _likeness(ids: np.ndarray, opening: np.ndarray, piece: np.ndarray) -> int:
    """Count the tokens in a row that the start of `piece` shares with the opening of a user's turn.

    A single one is chance and counts as none.
    """
    # a line break may come first or be missing
    start = piece[: opening.size + 1]
    matcher = SequenceMatcher(None, ids[opening].tolist(), ids[start].tolist(), autojunk=False)
    size = matcher.find_longest_match().size
    return size if size > 1 else 0


def _split(ids: np.ndarray, positions: np.ndarray, ends: tuple[int, ...]) -> list[np.ndarray]:
    """Split `positions` at the `ends`, which belong to no piece; the last piece is what follows the final end."""
    at = np.flatnonzero(np.isin(ids[positions], ends))
    first, *others = np.split(positions, at)
    return [first, *(piece[1:] for piece in others)]


def _ids(config: Any, name: str) -> list[int]:
    ids = getattr(config, name, None)
    if isinstance(ids, torch.Tensor):
        ids = ids.tolist()
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _common_start(one: list[str], other: list[str]) -> list[str]:
    return [x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _conversation(processor: Any) -> str:
    """Render a question, a reply and a question by the chat template."""
    said = ((_QUESTION, "user"), (_REPLY, "assistant"), (_LAST_QUESTION, "user"))
    in_parts = [{"role": role, "content": [{"type": "text", "text": words}]} for words, role in said]
    in_words = [{"role": role, "content": words} for words, role in said]
    rendered = ""
    # templates of language models expect contents that are plain text, and print lists of parts as Python would
    for messages in (in_parts, in_words):
        try:
            rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except ValueError as error:
            raise ValueError(
                "query: expected a processor or tokenizer with a chat template, got one without; pass a bool mask "
                "[B, T] or a callable instead"
            ) from error
        except Exception:  # whatever the template raises for contents of the other kind
            continue
        if rendered and "'type'" not in rendered:
            break
    return rendered


def _bare(text: str) -> str:
    """Strip all white space from `text`: tokenizers add and drop it at will."""
    return "".join(text.replace("▁", " ").split())
