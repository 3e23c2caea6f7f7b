"""Checks that the public functions share. Each error says what was expected, what came and what to do."""

from __future__ import annotations

import math
import numbers
import threading
from collections.abc import Hashable
from typing import Any

import torch

from hawk_kernels.selection import ROUNDINGS

# Rows are shorter than this, so a larger budget keeps as much; an operator takes no integers beyond 64 bits.
_MAX_BUDGET = 2**31 - 1
# Scores are computed from these dtypes; float64 has no kernel.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

NORMALIZATIONS = (None, "l2", "softmax", "minmax")


class Passed:
    """The signatures of calls that have passed the checks of their shapes, dtypes and devices.

    A call of the same signature need not be checked again, because a signature holds all that the checks look at; it
    holds no tensor. Any number of threads may ask and add. When the limit is reached, all signatures are forgotten,
    and the next calls are checked once more.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._signatures: set[Hashable] = set()

    def __contains__(self, signature: Hashable) -> bool:
        return signature in self._signatures

    def __len__(self) -> int:
        return len(self._signatures)

    def add(self, signature: Hashable) -> None:
        """Remember that this signature has passed."""
        with self._lock:
            if len(self._signatures) >= self._limit:
                self._signatures = set()
            self._signatures.add(signature)


def shape_of(tensor: torch.Tensor) -> list[int]:
    """Return a shape as messages show it."""
    return list(tensor.shape)


def check_tensor(name: str, value: object) -> None:
    """Check that `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}; use torch.as_tensor")


def check_mask(name: str, mask: object, shape: tuple[int, ...], meaning: str, device: torch.device) -> None:
    """Check that `mask` is a bool tensor of this shape on this device; `meaning` says what an entry stands for."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{name}: expected a bool torch.Tensor or None, got {type(mask).__name__}; use torch.as_tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected dtype torch.bool, got {mask.dtype}; use {name}.bool()")
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"{name}: expected shape {list(shape)} ({meaning}), got {shape_of(mask)}; True marks what counts"
        )
    if mask.device != device:
        raise ValueError(f"{name}: expected device {device}, got {mask.device}; use {name}.to({str(device)!r})")


def check_normalize(normalize: object) -> None:
    """Check that `normalize` is a known name."""
    if normalize not in NORMALIZATIONS:
        raise ValueError(
            f"normalize: expected None, 'l2', 'softmax' or 'minmax', got {normalize!r}; the release has 'l2'"
        )


def check_rounding(rounding: str) -> str:
    """Return `rounding`, or raise a ValueError if it is not a known name."""
    if rounding not in ROUNDINGS:
        raise ValueError(
            f"rounding: expected 'floor' (paper) or 'ceil' (release) or 'nearest' (half to even), got {rounding!r}"
        )
    return rounding


def as_written(ratio: Any) -> float:
    """Read a ratio as it was written: NumPy's `float32(0.7)` is 0.7, not the 0.699999988 that it holds."""
    # NumPy prints the shortest number that reads back as the same one
    return float(str(ratio)) if type(ratio).__module__ == "numpy" else float(ratio)


def checked_keep_ratio(name: str, value: object) -> float | int:
    """Return what says how much is kept, a float in (0, 1] or an int >= 1, or raise an error that calls it `name`.

    A symbolic int, as `torch.compile` passes one, stays symbolic.
    """
    if type(value) is float and 0.0 < value <= 1.0:
        return value
    expected = f"{name}: expected a float in (0, 1] (the fraction kept) or an int >= 1 (a budget)"
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        has_item = hasattr(value, "item")
        remedy = f"read it first: {name}.item() waits for the device" if has_item else "0.2 keeps a fifth"
        raise TypeError(f"{expected}, got {type(value).__name__}; {remedy}")
    if isinstance(value, (numbers.Integral, torch.SymInt)):
        budget: Any = value if isinstance(value, torch.SymInt) else int(value)
        if budget < 1:
            raise ValueError(f"{expected}, got {value}; to keep everything use 1.0")
        kept: int = budget
        return kept
    ratio = as_written(value)
    if not 0.0 < ratio <= 1.0:
        remedy = "it is the fraction kept, not the fraction removed"
        if math.isfinite(ratio) and ratio > 1.0:
            remedy += f"; for a budget pass the int {max(1, round(ratio))}"
        raise ValueError(f"{expected}, got {value}; {remedy}")
    return ratio


def checked_keep(r: object, num_keys: int, masked: bool) -> tuple[float, int]:
    """Return a keep ratio as `(ratio, 0)` and a budget as `(1.0, budget)`."""
    kept = checked_keep_ratio("r", r)
    if isinstance(kept, float):
        return kept, 0
    if not masked and kept > num_keys:
        raise ValueError(
            f"r: expected a budget of at most {num_keys} keys, got {r}; use a float, or min(budget, {num_keys})"
        )
    return 1.0, kept if isinstance(kept, torch.SymInt) else min(kept, _MAX_BUDGET)


def check_queries_and_keys(q: torch.Tensor, k: torch.Tensor) -> None:
    """Check the types, dtypes, shapes and devices of `q` and `k`."""
    check_tensor("q", q)
    check_tensor("k", k)
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name}: expected dtype float32, float16 or bfloat16, got {tensor.dtype}; use {name}.float()"
            )
    if q.dtype != k.dtype:
        raise TypeError(f"k: expected the dtype of q, {q.dtype}, got {k.dtype}; use k.to(q.dtype)")
    if q.dim() not in (3, 4):
        raise ValueError(f"q: expected [B, H, N, D] or [H, N, D], got shape {shape_of(q)}; use unflatten or unsqueeze")
    if k.dim() != q.dim():
        layout = "[B, Hkv, M, D]" if q.dim() == 4 else "[Hkv, M, D]"
        raise ValueError(
            f"k: expected {layout} because q has {q.dim()} dimensions, got shape {shape_of(k)}; batch both or neither"
        )
    if q.dim() == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(
            f"k: expected batch size {q.shape[0]} as q has, got {k.shape[0]} (shape {shape_of(k)}); expand a batch of 1"
        )
    num_heads, _, head_dim = q.shape[-3:]
    num_key_value_heads = k.shape[-3]
    if k.shape[-1] != head_dim:
        raise ValueError(
            f"k: expected head_dim {head_dim} as q has, got {k.shape[-1]} (shape {shape_of(k)}); the last dimension is "
            "that of one head"
        )
    if num_heads < 1 or head_dim < 1:
        raise ValueError(
            f"q: expected at least one head and head_dim >= 1, got shape {shape_of(q)}; heads are in front of tokens"
        )
    if num_key_value_heads < 1 or num_heads % num_key_value_heads != 0:
        raise ValueError(
            f"k: expected a number of KV heads that divides q's {num_heads} heads, got {num_key_value_heads}; pass the "
            "keys before they are repeated, heads in front of tokens"
        )
    check_device("k", k, q.device)


def check_head_vector(name: str, weights: torch.Tensor, q: torch.Tensor) -> None:
    """Check that `weights` has one floating point weight for each head of `q`, on its device."""
    check_tensor(name, weights)
    if not weights.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating point dtype, got {weights.dtype}; use {name}.float()")
    num_heads = q.shape[-3]
    if weights.dim() != 1 or weights.shape[0] != num_heads:
        raise ValueError(
            f"{name}: expected shape [{num_heads}], one weight a head of q, got {shape_of(weights)}; a group shares "
            "its keys, not its weights"
        )
    check_device(name, weights, q.device)


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Check that `tensor` is on `device`, where `q` is."""
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} as q, got {tensor.device}; use {name}.to({str(device)!r})")


def checked_scale(scale: float | None, head_dim: int) -> float:
    """Return the scale, by default `D ** -0.5`, or raise an error if it is not a finite number."""
    if scale is None:
        return float(head_dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scale: expected a float or None (D ** -0.5), got {type(scale).__name__}; pass a number")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}; None means D ** -0.5")
    return float(scale)
