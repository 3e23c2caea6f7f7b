"""Selects greedily in one launch for all picks: one program for each row holds the row's state in registers.

Each pick depends on the one before it, so with a launch for every step of every pick a GPU would mostly wait for
launches. The cosines of all pairs come from one matrix product before the launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.eager import greedy as eager_greedy
from hawk_kernels.backends.eager.greedy import SPANNED, SPANNED_GAIN, Cosines
from hawk_kernels.backends.kernels.launch import launch, on_device
from hawk_kernels.selection import Selection

# Columns that a program holds: the least that a row fits in. A block for each power of two would be a kernel for each.
_BLOCKS = (1024, 4096, 8192, 16384)
# AMD's backend would also compile a kernel for matrices of more than 2 GiB and one for smaller ones.
_VARYING = ("cosines_ptr", "budget_ptr", "num_tokens", "width")
# A program reads at most this many elements of the Cholesky factor at once, rows times columns.
_TILE = 8192
_MOST_ROWS = 8
_SPANNED, _SPANNED_GAIN = tl.constexpr(SPANNED), tl.constexpr(SPANNED_GAIN)


@triton.jit(do_not_specialize=_VARYING)
def _max_min_kernel(
    cosines_ptr, nearest_ptr, worst_ptr, budget_ptr, at_pick_ptr, order_ptr, num_tokens, width,
    HAS_BUDGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_tokens
    cosines_ptr += row * num_tokens * num_tokens
    nearest_ptr += row * num_tokens
    order_ptr += row * width
    at_pick_ptr += row * width
    nearest = tl.load(nearest_ptr + columns, mask=inside, other=float("inf"))
    picks = width
    if HAS_BUDGET:
        picks = tl.load(budget_ptr + row).to(tl.int32)
    for place in range(picks):
        value, picked = tl.min(nearest, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(order_ptr + place, picked.to(tl.int64))
        tl.store(at_pick_ptr + place, value)
        if place == 0:
            # The first pick is far from all others, the next ones from those that are picked.
            nearest = tl.load(worst_ptr + row * num_tokens + columns, mask=inside, other=float("inf"))
        similar = tl.load(cosines_ptr + picked.to(tl.int64) * num_tokens + columns, mask=inside, other=float("-inf"))
        nearest = tl.maximum(nearest, similar)
    tl.store(nearest_ptr + columns, nearest, mask=inside)


@triton.jit(do_not_specialize=(*_VARYING, "factor_ptr"))
def _dpp_kernel(
    cosines_ptr, length_ptr, weight_ptr, budget_ptr, factor_ptr, at_pick_ptr, order_ptr, gain_ptr, num_tokens, width,
    HAS_BUDGET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_tokens
    cosines_ptr += row * num_tokens * num_tokens
    factor_ptr += row * width * num_tokens
    entry_ptr = factor_ptr
    order_ptr += row * width
    at_pick_ptr += row * width
    outside = tl.load(length_ptr + row * num_tokens + columns, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + row * num_tokens + columns, mask=inside, other=float("-inf"))
    picks = width
    if HAS_BUDGET:
        picks = tl.load(budget_ptr + row).to(tl.int32)
    for place in range(picks):
        gain = tl.where(outside > _SPANNED, outside, _SPANNED_GAIN) * weight
        value, picked = tl.max(gain, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(order_ptr + place, picked.to(tl.int64))
        tl.store(at_pick_ptr + place, value)
        chosen = columns == picked
        weight = tl.where(chosen, float("-inf"), weight)
        remains = tl.sum(tl.where(chosen, outside, 0.0), 0)
        left = tl.load(cosines_ptr + picked.to(tl.int64) * num_tokens + columns, mask=inside, other=0.0)
        for start in range(0, place, ROWS):
            earlier = start + tl.arange(0, ROWS)
            ptrs = factor_ptr + earlier.to(tl.int64) * num_tokens
            taken = tl.load(ptrs + picked, mask=earlier < place, other=0.0)
            among = (earlier < place)[:, None] & inside[None, :]
            left -= tl.sum(taken[:, None] * tl.load(ptrs[:, None] + columns[None, :], mask=among, other=0.0), 0)
        # Nothing of a spanned token is left to take away from others.
        entry = tl.where(remains > _SPANNED, left / tl.sqrt(tl.maximum(remains, _SPANNED)), 0.0)
        tl.store(entry_ptr + columns, entry, mask=inside)
        entry_ptr += num_tokens
        # Other threads read it as what the next picks have taken.
        tl.debug_barrier()
        outside -= entry * entry
    gain = tl.where(outside > _SPANNED, outside, _SPANNED_GAIN) * weight
    tl.store(gain_ptr + row * num_tokens + columns, gain, mask=inside)


def launch_config(num_tokens: int) -> dict[str, Any]:
    """Choose blocks and warps for rows of this length."""
    block = next((block for block in _BLOCKS if block >= num_tokens), triton.next_power_of_2(num_tokens))
    rows = max(1, min(_MOST_ROWS, _TILE // block))
    return {"block": {"BLOCK": block}, "rows": {"ROWS": rows}, "num_warps": max(4, min(16, block // 256))}


def greedy_max_min(features: torch.Tensor, r: float | int, mask: torch.Tensor | None, rounding: str) -> Selection:
    """Select by validated features `[B, M, D]`."""
    return eager_greedy.greedy_max_min(features, r, mask, rounding, picks=max_min_picks)


def greedy_dpp(
    features: torch.Tensor, quality: torch.Tensor, r: float | int, mask: torch.Tensor | None, rounding: str
) -> Selection:
    """Select by validated features `[B, M, D]` and float32 quality `[B, M]`."""
    return eager_greedy.greedy_dpp(features, quality, r, mask, rounding, picks=dpp_picks)


def max_min_picks(
    cosines: Cosines, candidates: torch.Tensor, finite: torch.Tensor, budget: torch.Tensor | None, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `eager_greedy.max_min_picks` does, in one launch."""
    batch, num_tokens = candidates.shape
    nearest, worst = eager_greedy.before_the_first(cosines, candidates, finite)
    at_pick = nearest.new_zeros(batch, width)
    order = torch.full((batch, width), num_tokens - 1, device=nearest.device)
    config = launch_config(num_tokens)
    if batch and width:
        with on_device(nearest.device):
            launch(
                _max_min_kernel, (batch,),
                (
                    cosines.matrix, nearest, worst, order if budget is None else budget, at_pick, order,
                    num_tokens, width,
                ),
                {"HAS_BUDGET": budget is not None, **config["block"]}, {"num_warps": config["num_warps"]},
            )  # fmt: skip
    return eager_greedy.as_distances(nearest, at_pick, order), order


def dpp_picks(
    cosines: Cosines, length: torch.Tensor, weight: torch.Tensor, budget: torch.Tensor | None, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `eager_greedy.dpp_picks` does, in one launch."""
    batch, num_tokens = weight.shape
    at_pick, gain = weight.new_zeros(batch, width), torch.empty_like(weight)
    order = torch.full((batch, width), num_tokens - 1, device=weight.device)
    factor = weight.new_empty(batch, width, num_tokens)
    config = launch_config(num_tokens)
    if batch:
        with on_device(weight.device):
            launch(
                _dpp_kernel, (batch,),
                (
                    cosines.matrix, length, weight, order if budget is None else budget, factor, at_pick, order, gain,
                    num_tokens, width,
                ),
                {"HAS_BUDGET": budget is not None, **config["rows"], **config["block"]},
                {"num_warps": config["num_warps"]},
            )  # fmt: skip
    return gain.scatter_(1, order, at_pick), order
