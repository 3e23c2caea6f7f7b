"""Top-k of given scores with a defined order: one launch, one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.triton.launch import on_device
from hawk_kernels.backends.triton.radix import budget_of, load_candidates, select_from_memory, select_in_registers
from hawk_kernels.selection import Selection, keep_fraction, max_kept

# The scores, keys and running counts of a longer row do not fit in the registers of one program.
MAX_ROW_IN_REGISTERS = 2048
_LONG_ROW_BLOCK = 1024
_NUM_WARPS = 8


def row_block(num_keys: int) -> int:
    """Columns that a program holds at once; a histogram wants at least as many elements as bins."""
    if num_keys > MAX_ROW_IN_REGISTERS:
        return _LONG_ROW_BLOCK
    return max(256, triton.next_power_of_2(num_keys))


@triton.jit
def _select_kernel(
    scores_ptr, candidates_ptr, mask_ptr, indices_ptr, out_scores_ptr,
    num_keys, width, numerator, denominator, budget, candidates_stride_b, candidates_stride_m,
    HAS_MASK: tl.constexpr, CEIL: tl.constexpr, IN_REGISTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * num_keys
    out_scores_ptr += row * num_keys
    mask_ptr += row * num_keys
    indices_ptr += row * width
    candidates_ptr += row * candidates_stride_b

    counted = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_keys, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        candidate = load_candidates(candidates_ptr, columns, num_keys, candidates_stride_m, HAS_MASK)
        counted += candidate.to(tl.int32)
        score = tl.load(scores_ptr + columns, mask=candidate, other=float("-inf"))
        tl.store(out_scores_ptr + columns, score, mask=columns < num_keys)
    kept = budget_of(tl.sum(counted, 0), numerator, denominator, budget, CEIL)

    if IN_REGISTERS:
        columns = tl.arange(0, BLOCK)
        candidate = load_candidates(candidates_ptr, columns, num_keys, candidates_stride_m, HAS_MASK)
        score = tl.load(scores_ptr + columns, mask=candidate, other=float("-inf"))
        select_in_registers(score, candidate, kept, num_keys, width, mask_ptr, indices_ptr, BLOCK)
    else:
        select_from_memory(
            scores_ptr, candidates_ptr, candidates_stride_m, kept, num_keys, width, mask_ptr, indices_ptr,
            HAS_MASK, BLOCK,
        )  # fmt: skip


def select_topk(scores: torch.Tensor, r: float | int, mask: torch.Tensor | None, rounding: str) -> Selection:
    """Selection of validated float32 scores `[B, M]` in one launch."""
    scores = scores.contiguous()
    batch, num_keys = scores.shape
    keep = torch.empty_like(scores, dtype=torch.bool)
    indices = torch.empty((batch, max_kept(r, num_keys, rounding)), dtype=torch.int64, device=scores.device)
    out_scores = torch.empty_like(scores)
    if batch and num_keys:
        with on_device(scores.device):
            _select_kernel[(batch,)](
                scores, scores if mask is None else mask, keep, indices, out_scores,
                num_keys, indices.shape[1], *keep_arguments(r, rounding),
                *((0, 0) if mask is None else mask.stride()),
                HAS_MASK=mask is not None, CEIL=rounding == "ceil",
                IN_REGISTERS=num_keys <= MAX_ROW_IN_REGISTERS, BLOCK=row_block(num_keys), num_warps=_NUM_WARPS,
            )  # fmt: skip
    return Selection(keep, indices, out_scores)


def keep_arguments(r: float | int, rounding: str) -> tuple[int, int, int]:
    """`(numerator, denominator, budget)` as `radix.budget_of` takes them; budget 0 means: by the fraction."""
    if isinstance(r, int):
        return 1, 1, r
    return *keep_fraction(r, rounding), 0
