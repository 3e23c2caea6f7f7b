"""scikit-learn's digits, split by instance: what is painted in training is never asked about in an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

HELD_OUT_EVERY = 5
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class DigitPool:
    """Glyphs `[N, 8, 8]` in 0..1, their labels `[N]`, and the positions `[N]` they have in scikit-learn's set."""

    glyphs: torch.Tensor
    labels: np.ndarray
    source_index: np.ndarray

    def of_label(self, label: int) -> np.ndarray:
        """Return the positions in this pool of the instances of one digit."""
        return np.flatnonzero(self.labels == label)


@lru_cache(maxsize=2)
def load_digits(split: str) -> DigitPool:
    """The digits of one split: `"train"`, or `"held_out"` (every fifth instance, never trained on)."""
    from sklearn.datasets import load_digits as sklearn_digits

    if split not in SPLITS:
        raise ValueError(f"split: expected 'train' or 'held_out', got {split!r}.")
    bunch = sklearn_digits()
    index = np.arange(len(bunch.target))
    is_held_out = index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    chosen = index[is_held_out if split == "held_out" else ~is_held_out]
    glyphs = torch.from_numpy((bunch.images[chosen] / 16.0).astype(np.float32))
    return DigitPool(glyphs, bunch.target[chosen].astype(np.int64), chosen)
