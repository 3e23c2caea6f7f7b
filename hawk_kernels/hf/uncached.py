"""Generation with `use_cache=False`: every step reads the whole prompt again, and must drop the same tokens."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

from hawk_kernels.hf.prompt import Prompt


class UncachedPrompt:
    """A prompt that was pruned without a cache.

    Args:
        prompt: the prompt on the host.
        features: its images, held weakly.
        kept: bool `[B, T]`, the tokens that stayed.
        counts: their number in each row.
    """

    def __init__(self, prompt: Prompt, features: tuple[Any, ...], kept: torch.Tensor, counts: list[int]) -> None:
        self._ids = prompt.ids
        self._features = [weakref.ref(feature) for feature in features]
        self._kept = kept
        self._counts = np.array(counts)
        self._length_now = prompt.ids.shape[1]

    def may_grow_into(self, input_ids: torch.Tensor, features: tuple[Any, ...]) -> bool:
        """Whether shapes and images look like the next step: one token more, about the very same images."""
        if tuple(input_ids.shape) != (self._ids.shape[0], self._length_now + 1):
            return False
        # some models put what they have encoded beside the pixels, for their next step
        return bool(features) == bool(self._features) and all(
            any(held() is feature for feature in features) for held in self._features
        )

    def grows_into(self, prompt: Prompt) -> bool:
        """Whether `prompt` begins with this one; if so it is the step that comes last."""
        grows = np.array_equal(prompt.ids[:, : self._ids.shape[1]], self._ids)
        self._length_now += int(grows)
        return grows

    def extended(self, valid: torch.Tensor, host_valid: np.ndarray) -> tuple[torch.Tensor, list[int]]:
        """The tokens that stay `[B, T]` and their number in each row, generated ones included."""
        start = self._ids.shape[1]
        kept = torch.cat([self._kept, valid[:, start:]], dim=1)
        return kept, (self._counts + host_valid[:, start:].sum(axis=1)).tolist()
