"""Top-k of given scores with a defined order: one program a row, in registers or, for long rows, in passes over L2."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.triton.launch import on_device
from hawk_kernels.backends.triton.radix import (
    RADIX_BINS,
    RADIX_BITS,
    budget_of,
    ordered_key,
    pick_digit,
    select_in_registers,
)
from hawk_kernels.selection import Selection, keep_fraction, max_kept

# The keys of a longer row do not fit in the registers of one program.
MAX_BLOCK = 16384
_LONG_ROW_BLOCK = 4096


def block_of(num_keys: int) -> int:
    """Row length in registers; a histogram wants at least as many elements as bins."""
    return max(256, triton.next_power_of_2(num_keys))


def warps_of(block: int) -> int:
    return 4 if block <= 1024 else 8 if block <= 4096 else 16


@triton.jit
def _select_row_kernel(
    scores_ptr, candidates_ptr, mask_ptr, indices_ptr, out_scores_ptr,
    num_keys, width, numerator, denominator, budget, candidates_stride_b, candidates_stride_m,
    HAS_MASK: tl.constexpr, CEIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_keys
    candidate = inside
    if HAS_MASK:
        offsets = row * candidates_stride_b + columns.to(tl.int64) * candidates_stride_m
        candidate = tl.load(candidates_ptr + offsets, mask=inside, other=0) != 0
    score = tl.load(scores_ptr + row * num_keys + columns, mask=candidate, other=float("-inf"))
    tl.store(out_scores_ptr + row * num_keys + columns, score, mask=inside)
    kept = budget_of(tl.sum(candidate.to(tl.int32), 0), numerator, denominator, budget, CEIL)
    select_in_registers(
        score, candidate, columns, kept, num_keys, width,
        mask_ptr + row * num_keys, indices_ptr + row * width, BLOCK,
    )  # fmt: skip


@triton.jit
def _load_keys(
    scores_ptr, candidates_ptr, row, columns, num_keys, candidates_stride_b, candidates_stride_m,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    candidate = columns < num_keys
    if HAS_MASK:
        offsets = row * candidates_stride_b + columns.to(tl.int64) * candidates_stride_m
        candidate = tl.load(candidates_ptr + offsets, mask=candidate, other=0) != 0
    score = tl.load(scores_ptr + row * num_keys + columns, mask=candidate, other=float("-inf"))
    return ordered_key(score, candidate), candidate, score


@triton.jit
def _select_long_row_kernel(
    scores_ptr, candidates_ptr, mask_ptr, indices_ptr, out_scores_ptr,
    num_keys, width, numerator, denominator, budget, candidates_stride_b, candidates_stride_m,
    HAS_MASK: tl.constexpr, CEIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)

    num_candidates = num_keys
    if HAS_MASK:
        counted = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_keys, BLOCK):
            columns = start + lanes
            offsets = row * candidates_stride_b + columns.to(tl.int64) * candidates_stride_m
            counted += (tl.load(candidates_ptr + offsets, mask=columns < num_keys, other=0) != 0).to(tl.int32)
        num_candidates = tl.sum(counted, 0)
    kept = budget_of(num_candidates, numerator, denominator, budget, CEIL)

    threshold = (kept * 0).to(tl.uint32)
    settled = (kept * 0).to(tl.uint32)
    num_tied = kept
    for step in tl.static_range(32 // RADIX_BITS):
        shift: tl.constexpr = 32 - RADIX_BITS * (step + 1)
        histogram = tl.zeros([RADIX_BINS], tl.int32)
        for start in range(0, num_keys, BLOCK):
            key, candidate, _ = _load_keys(
                scores_ptr, candidates_ptr, row, start + lanes, num_keys, candidates_stride_b,
                candidates_stride_m, HAS_MASK,
            )  # fmt: skip
            digit = ((key >> shift) & (RADIX_BINS - 1)).to(tl.int32)
            active = candidate & ((key & settled) == threshold)
            histogram += tl.histogram(digit, RADIX_BINS, mask=active)
        chosen, above = pick_digit(histogram, num_tied)
        threshold = threshold | (chosen.to(tl.uint32) << shift)
        settled = settled | ((RADIX_BINS - 1) << shift)
        num_tied -= above

    num_kept_before = kept * 0
    num_tied_before = kept * 0
    for start in range(0, num_keys, BLOCK):
        columns = start + lanes
        key, candidate, score = _load_keys(
            scores_ptr, candidates_ptr, row, columns, num_keys, candidates_stride_b, candidates_stride_m, HAS_MASK
        )
        tl.store(out_scores_ptr + row * num_keys + columns, score, mask=columns < num_keys)
        tied = candidate & (key == threshold)
        tie_rank = num_tied_before + tl.cumsum(tied.to(tl.int32), 0)
        keep = candidate & (kept > 0) & ((key > threshold) | (tied & (tie_rank <= num_tied)))
        tl.store(mask_ptr + row * num_keys + columns, keep, mask=columns < num_keys)
        position = num_kept_before + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(indices_ptr + row * width + position, columns.to(tl.int64), mask=keep)
        padding = tl.full([BLOCK], -1, tl.int64)
        tl.store(indices_ptr + row * width + columns, padding, mask=(columns >= kept) & (columns < width))
        num_tied_before += tl.sum(tied.to(tl.int32), 0)
        num_kept_before += tl.sum(keep.to(tl.int32), 0)


def select_topk(
    scores: torch.Tensor, r: float | int, mask: torch.Tensor | None, rounding: str, in_place: bool = False
) -> Selection:
    """Selection of validated float32 scores `[B, M]` in one launch.

    `in_place` says that the scores are the caller's own and already `-inf` outside the mask, and may be returned.
    """
    scores = scores.contiguous()
    batch, num_keys = scores.shape
    width = max_kept(r, num_keys, rounding)
    keep = torch.empty_like(scores, dtype=torch.bool)
    indices = torch.empty((batch, width), dtype=torch.int64, device=scores.device)
    out_scores = scores if in_place else torch.empty_like(scores)
    if batch == 0 or num_keys == 0:
        return Selection(keep, indices, out_scores)
    numerator, denominator, budget = keep_arguments(r, rounding)
    long_row = num_keys > MAX_BLOCK
    block = _LONG_ROW_BLOCK if long_row else block_of(num_keys)
    kernel = _select_long_row_kernel if long_row else _select_row_kernel
    with on_device(scores.device):
        kernel[(batch,)](
            scores, scores if mask is None else mask, keep, indices, out_scores,
            num_keys, width, numerator, denominator, budget,
            0 if mask is None else mask.stride(0), 0 if mask is None else mask.stride(1),
            HAS_MASK=mask is not None, CEIL=rounding == "ceil", BLOCK=block,
            num_warps=warps_of(block),
        )  # fmt: skip
    return Selection(keep, indices, out_scores)


def keep_arguments(r: float | int, rounding: str) -> tuple[int, int, int]:
    """`(numerator, denominator, budget)` as `radix.budget_of` takes them; budget 0 means: by the fraction."""
    if isinstance(r, int):
        return 1, 1, r
    return *keep_fraction(r, rounding), 0
