"""Random choice, the floor that any method must clear: every token of a prompt is equally likely to stay."""

from __future__ import annotations

import numbers

import numpy as np
import torch
from numpy.typing import NDArray

from hawk_kernels.methods.base import Method, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.validation import check_rounding

_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@register
class Random(Method):
    """Keeps tokens drawn without regard to what they show.

    Token `m` of a prompt scores the upper 24 bits of `splitmix64(splitmix64(seed) + key, m)` (Steele et al., OOPSLA
    2014) over 2^24, where `key` is a checksum of the prompt's own token ids. A prompt therefore keeps the same tokens
    alone, in any batch, with any padding and on any device, and different questions keep different ones.

    Args:
        seed: an int, 0 or more.
        rounding: "floor" or "ceil".

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "random"
    summary = "Keeps tokens drawn from a seed, the floor that any method must clear."
    signal = "nothing; the draw depends on the prompt's token ids"
    reads_layer = False

    def __init__(self, seed: int = 0, rounding: str = "floor") -> None:
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}; the same seed keeps the same tokens")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: expected an int in [0, 2**64), got {seed}; take any other number")
        self.seed: int = int(seed)
        check_rounding(rounding)
        self.rounding = rounding

    def score(self, view: PrefillView) -> torch.Tensor:
        num_tokens = view.candidates.shape[1]
        rows = [random_scores(self.seed, key, num_tokens) for key in view.row_keys()]
        scores = torch.from_numpy(np.stack(rows)).to(view.candidates.device, non_blocking=True)
        return scores.masked_fill_(~view.candidates, -torch.inf)


def random_scores(seed: int, key: int, count: int) -> NDArray[np.float32]:
    """Score the first `count` tokens of a prompt, float32 in [0, 1)."""
    # arrays, since numpy warns where scalars wrap
    start = _mixed(np.array([seed], dtype=np.uint64)) + np.uint64(key)
    mixed = _mixed(_mixed(start) + np.arange(count, dtype=np.uint64) * np.uint64(_STEP))
    scores: NDArray[np.float32] = (mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    return scores


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return one output of splitmix64 for each state."""
    x: NDArray[np.uint64] = state + np.uint64(_STEP)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    x ^= x >> np.uint64(31)
    return x
