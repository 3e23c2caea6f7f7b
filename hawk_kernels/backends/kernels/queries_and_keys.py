"""Lays out queries and keys for kernels: pointers in one tuple, the strides of a model in another, others singly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hawk_kernels.backends.kernels.finish import Memory, Outputs
from hawk_kernels.backends.kernels.views import stride_unit


class Tensors(NamedTuple):
    """What a launch reads, as pointers, beside the masks, whose alignment varies with the prompt."""

    q: Any
    k: Any
    w: Any


class Strides(NamedTuple):
    """Strides that a model has, whatever the prompt; those that vary with it are arguments of their own."""

    q_n: Any
    q_d: Any
    k_m: Any
    k_d: Any
    w: Any


class Layout(NamedTuple):
    """How the tensors of a call lie in memory.

    Attributes:
        strides: those that a model has.
        varying: the others, in the order of the kernels' arguments: those of the masks `[B, N]` and `[B, M]`, 0 where
            there is none, then those of rows and heads of the queries and of the keys, in units.
        unit: see `stride_unit`.
    """

    strides: Strides
    varying: tuple[int, ...]
    unit: int


def layout_of(
    q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, q_mask: torch.Tensor | None, k_mask: torch.Tensor | None
) -> Layout:
    """Return the layout of queries `[B, H, N, D]`, keys `[B, Hkv, M, D]`, weights `[H]` and masks."""
    (q_b, q_h, q_n, q_d), (k_b, k_h, k_m, k_d) = q.stride(), k.stride()
    unit = stride_unit(q.shape[-1], q_b, q_h, k_b, k_h)
    of_masks = (stride for mask in (q_mask, k_mask) for stride in ((0, 0) if mask is None else mask.stride()))
    return Layout(
        Strides(q_n, q_d, k_m, k_d, w.stride(0)),
        (*of_masks, q_b // unit, q_h // unit, k_b // unit, k_h // unit),
        unit,
    )


def arranging(strides: Strides, numbers: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    """Return a function that puts the tensors of `PreparedSelection.run` in the order of a kernel's arguments.

    Args:
        strides: those that a model has.
        numbers: the arguments after the masks.
    """

    def arrange(
        q: Any, k: Any, w: Any, floats: Any, words: Any, counters: Any, scores: Any, mask: Any, indices: Any,
        q_mask: Any, k_mask: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        memory, outputs = Memory(floats, words, counters), Outputs(scores, mask, indices)
        return Tensors(q, k, w), strides, memory, outputs, q_mask, k_mask, *numbers

    return arrange
