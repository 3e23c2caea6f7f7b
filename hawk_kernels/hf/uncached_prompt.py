"""Follows a generation without a cache, whose every step reads the whole prompt again and must drop the same tokens."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

from hawk_kernels.hf.choose_tokens import Kept
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.selection import Merge


class UncachedPrompt:
    """Recognises the next step of a generation without a cache, and drops the tokens that the first step dropped.

    Args:
        prompt: the prompt on the host.
        features: its images, held weakly.
        kept: for each stage the tokens that stayed, bool `[B, T]`, and how many those are in each row.
        merge: made kept tokens sums of visual tokens, which it does in each step; None means none.
        inner_merges: the same for each stage inside the stack.
    """

    def __init__(
        self,
        prompt: Prompt,
        features: tuple[Any, ...],
        kept: list[Kept],
        merge: Merge | None = None,
        inner_merges: list[Merge | None] | None = None,
    ) -> None:
        self.merge = merge
        self.inner_merges = list(inner_merges or [])
        self._ids = prompt.ids
        self._features = [weakref.ref(feature) for feature in features]
        self._kept = list(kept)
        self._length_now = prompt.ids.shape[1]

    def may_grow_into(self, input_ids: torch.Tensor, features: tuple[Any, ...]) -> bool:
        """Tell whether shapes and images look like the next step: one token more, about the very same images."""
        if tuple(input_ids.shape) != (self._ids.shape[0], self._length_now + 1):
            return False
        # some models put what they have encoded beside the pixels, to find it there in their next step
        return bool(features) == bool(self._features) and all(
            any(held() is feature for feature in features) for held in self._features
        )

    def grows_into(self, prompt: Prompt) -> bool:
        """Tell whether `prompt` begins with this one; if so, it becomes the latest step."""
        grows = np.array_equal(prompt.ids[:, : self._ids.shape[1]], self._ids)
        self._length_now += int(grows)
        return grows

    def extended(self, valid: torch.Tensor, host_valid: np.ndarray) -> list[Kept]:
        """Mark and count what stays after each stage as `kept` does, generated tokens included."""
        start = self._ids.shape[1]
        new = host_valid[:, start:].sum(axis=1)
        return [
            (torch.cat([kept, valid[:, start:]], dim=1), (np.array(counts) + new).tolist())
            for kept, counts in self._kept
        ]
