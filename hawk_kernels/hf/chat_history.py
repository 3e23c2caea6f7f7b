"""Lets `generate` continue a chat history over a cache that holds its beginning, without reading old images again.

transformers takes only the tokens that the cache lacks, going by the length that the cache reports, but passes on all
images of the history.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.hooks import visual_features
from hawk_kernels.hf.pruned_cache import CachedPrompt, CacheRecords, count_dropped, guard

_ENCODED = "mm_encoder_outputs"


@dataclass(frozen=True)
class History:
    """The beginning of a conversation, which a cache holds.

    Attributes:
        ids: the whole conversation, `[B, T]`.
        cache: the cache.
        num_dropped: tokens by which a row of the cache is shorter than what it stands for.
        seen: tokens of a row that it stood for at the start.
    """

    ids: torch.Tensor
    cache: Any
    num_dropped: int
    seen: int

    def begin(self) -> None:
        """Let the cache report to `generate` the length before pruning."""
        if self.num_dropped:
            guard(self.cache)
            self.count_dropped(True)

    def count_dropped(self, counts: bool) -> None:
        """Let the cache, outside the model, report its length as the caller counts it."""
        count_dropped(self.cache, self.num_dropped if counts else 0)


def history_of(
    records: CacheRecords[CachedPrompt], ids: torch.Tensor | None, arguments: dict[str, Any]
) -> History | None:
    """Find the history that a call of `generate` continues.

    Args:
        records: of what was dropped before the first layer.
        ids: the prompt of the call, `[B, T]`.
        arguments: of the call.

    Returns:
        The history; None where the cache is of fixed size, or `ids` are the new tokens alone.

    Raises:
        ValueError: the conversation has no token after those in the cache.
    """
    cache, mask = arguments["past_key_values"], arguments.get("attention_mask")
    # a mask that is longer tells that the ids are the new tokens alone
    if ids is None or (mask is not None and mask.shape[-1] != ids.shape[1]):
        return None
    record = records.of(cache)
    # the length of a cache of fixed size lives on the device
    if getattr(cache, "is_compileable", False) or (record is not None and not record.grows):
        return None
    # the cache of an assistant may still report the length before pruning
    count_dropped(cache, 0)
    dropped = 0 if record is None else record.num_dropped
    seen = int(cache.get_seq_length()) + dropped
    if record is not None and ids.shape[1] <= seen:
        raise ValueError(
            f"input_ids: expected the whole conversation, of which {seen} tokens, counted before pruning, are in "
            f"past_key_values, got {ids.shape[1]} tokens; append the new turn, or pass the new tokens alone with "
            "an attention_mask over the whole conversation"
        )
    return History(ids, cache, dropped, seen)


def new_images_only(anatomy: Anatomy, history: History, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Leave out the images that the cache of a history holds already; None where there are none to leave out."""
    if not history.seen or not visual_features(kwargs, anatomy.family.features):
        return None
    return without_old_images(anatomy, history.ids, history.seen, kwargs)


def without_old_images(anatomy: Anatomy, history: torch.Tensor, seen: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leave out the images whose tokens are in the cache already.

    Args:
        anatomy: the model's parts.
        history: the ids that `generate` was called with, `[B, T]`.
        seen: how many tokens of each row, counted before pruning, the cache stands for.
        kwargs: arguments of the multimodal model for the tokens after these; they may hold the images of the whole
            history.

    Returns:
        The same arguments, with the images of the new tokens alone.

    Raises:
        ValueError: the images are neither those of the history nor those of its new part, or old and new ones came as
            pixels, which only the vision encoder can tell apart.
    """
    ids = history.cpu().numpy()
    is_visual = np.isin(ids, anatomy.visual_token_ids)
    pixels = [name for name in anatomy.family.features if kwargs.get(name) is not None]
    if not is_visual[:, seen:].any():
        return {name: value for name, value in kwargs.items() if name not in (*pixels, _ENCODED)}
    if pixels and is_visual[:, :seen].any():
        raise ValueError(
            f"{pixels[0]}: expected images that the model encodes before it reads the prompt, got pixels of a history "
            f"whose first {seen} tokens are in the cache; a {anatomy.family.model_type} cannot add images to a pruned "
            "cache, so start with a new cache"
        )
    encoded = {
        kind: None if features is None else _new_features(anatomy, kind, features, ids, seen, len(kwargs["input_ids"]))
        for kind, features in (kwargs.get(_ENCODED) or {}).items()
    }
    return {**kwargs, _ENCODED: encoded} if encoded else kwargs


def _new_features(anatomy: Anatomy, kind: str, features: Any, ids: np.ndarray, seen: int, rows: int) -> Any:
    """Take the features of the tokens after the first `seen` ones; None where there are none."""
    of_kind = np.isin(ids, [token_id for token_id, other in anatomy.kinds.items() if other == kind])
    # generate repeats a sample for its beams and return sequences
    of_kind = of_kind.repeat(rows // len(ids), axis=0)
    is_new = np.nonzero(of_kind)[1] >= seen
    given = sum(entry.shape[:-1].numel() for entry in features.pooler_output)
    if given == is_new.sum():
        return features
    if given != is_new.size:
        raise ValueError(
            f"input_ids: expected images for the {is_new.size} visual tokens of the history, or for the "
            f"{is_new.sum()} new ones among them, got images of {given}; pass the images of the whole history"
        )
    if not is_new.any():
        return None
    taken = torch.from_numpy(np.flatnonzero(is_new))
    new = copy.copy(features)
    new.pooler_output = _rows(features.pooler_output, taken)
    deepstack = getattr(features, "deepstack_features", None)
    if deepstack is not None:
        new.deepstack_features = [_rows(layer, taken) for layer in deepstack]
    return new


def _rows(features: Any, taken: torch.Tensor) -> Any:
    """Take some rows of features, `[S, C]` or entries of `[..., C]`, in the container that they came in."""
    if isinstance(features, torch.Tensor):
        rows = features.flatten(0, -2).index_select(0, taken.to(features.device))
        return rows if features.dim() == 2 else rows.unsqueeze(0)
    whole = torch.cat([entry.flatten(0, -2) for entry in features])
    return [whole.index_select(0, taken.to(whole.device))]
