"""The user's last turn in a prompt that a chat template made, found by what the template writes around turns."""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch

_QUESTION, _REPLY, _LAST_QUESTION = "hawkfirstquestion", "hawkreply", "hawklastquestion"


class ChatQuestion:
    """Marks the user's last turn: a `query=` for `prune`, made from a processor or tokenizer with a chat template.

    Of that turn it marks the words behind the last special token that has words behind it, which are those behind the
    images, or those before where none follow. Special tokens are never marked.

    Args:
        processor: has `apply_chat_template`; its tokenizer reads the ids.

    Raises:
        ValueError: there is no chat template, or none that shows where a user's turn begins.
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
        """True at the text of each row's last question, bool like `input_ids`, int64 `[B, T]`."""
        mask = torch.zeros(input_ids.shape, dtype=torch.bool)
        for row, ids in enumerate(input_ids.tolist()):
            mask[row, self._question(ids)] = True
        return mask.to(input_ids.device)

    def _units(self, text: str) -> list[str]:
        """Special tokens of `text`, and the characters between them."""
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
        turn, behind = [], 0
        for position, piece in enumerate(pieces):
            if start <= behind and behind + len(piece) <= stop:
                turn.append(position)
            behind += len(piece)
        words = [position for position in turn if ids[position] not in self._special and pieces[position]]
        specials = [position for position in turn if ids[position] in self._special]
        last = max((special for special in specials if words and special < words[-1]), default=-1)
        return [position for position in words if position > last]


def _common_start(one: list[str], other: list[str]) -> list[str]:
    return [x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _conversation(processor: Any) -> str:
    """A question, a reply and a question as the chat template writes them."""
    said = ((_QUESTION, "user"), (_REPLY, "assistant"), (_LAST_QUESTION, "user"))
    in_parts = [{"role": role, "content": [{"type": "text", "text": words}]} for words, role in said]
    in_words = [{"role": role, "content": words} for words, role in said]
    rendered = ""
    # templates of language models know contents that are text alone, and print the others as Python does
    for messages in (in_parts, in_words):
        try:
            rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except ValueError as error:
            raise ValueError(
                "query: expected a processor or tokenizer with a chat template, got one without; pass a bool mask "
                "[B, T] or a callable instead"
            ) from error
        except Exception:  # a template's own complaint about the kind of content
            continue
        if rendered and "'type'" not in rendered:
            break
    return rendered


def _bare(text: str) -> str:
    """`text` without white space, which tokenizers add and drop at will."""
    return "".join(text.replace("▁", " ").split())
