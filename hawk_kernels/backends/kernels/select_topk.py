"""Top-k of given scores with a defined order, in one launch: one program a row, or many where a row is long."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.kernels import finish
from hawk_kernels.backends.kernels.finish import select
from hawk_kernels.backends.kernels.launch import check_limits, launch_counters, on_device, workspace
from hawk_kernels.backends.kernels.phases import arrive, counters_of_row, draw_ticket, num_counters, wait_for
from hawk_kernels.backends.kernels.radix import clear_histograms, count_first_digit, load_candidates, ordered_key
from hawk_kernels.selection import Selection, keep_fraction, max_kept

_NUM_WARPS = 4
_CLEARED, _SCORES = (tl.constexpr(counter) for counter in range(2))


@triton.jit
def _select_kernel(
    scores_ptr, candidates_ptr, words_ptr, counters_ptr, mask_ptr, indices_ptr, out_scores_ptr,
    batch, num_keys, words_per_row, width, numerator, denominator, budget, candidates_stride_b, candidates_stride_m,
    HAS_MASK: tl.constexpr, CEIL: tl.constexpr, IN_REGISTERS: tl.constexpr,
    BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    ticket = draw_ticket(counters_ptr)
    blocks = tl.cdiv(num_keys, BLOCK)
    num_clearing = 0 if IN_REGISTERS else batch
    if ticket < num_clearing:
        clear_histograms(words_ptr + ticket.to(tl.int64) * words_per_row)
        arrive(counters_of_row(counters_ptr, ticket) + _CLEARED)
    else:
        index = ticket - num_clearing
        block = index % blocks
        row = (index // blocks) % batch
        phase = index // (blocks * batch)
        counters = counters_of_row(counters_ptr, row)
        wide_row = row.to(tl.int64)
        words_ptr += wide_row * words_per_row
        candidates_ptr += wide_row * candidates_stride_b
        out_scores_ptr += wide_row * num_keys
        if phase == 0:
            columns = block * BLOCK + tl.arange(0, BLOCK)
            candidate = load_candidates(candidates_ptr, columns, num_keys, candidates_stride_m, HAS_MASK)
            score = tl.load(scores_ptr + wide_row * num_keys + columns, mask=candidate, other=float("-inf"))
            tl.store(out_scores_ptr + columns, score, mask=columns < num_keys)
            if not IN_REGISTERS:
                wait_for(counters + _CLEARED, 1)
                count_first_digit(ordered_key(score, candidate), candidate, words_ptr)
            arrive(counters + _SCORES)
        else:
            select(
                phase - 1, block, out_scores_ptr, candidates_ptr, mask_ptr + wide_row * num_keys,
                indices_ptr + wide_row * width, words_ptr, counters, counters + _SCORES, blocks,
                num_keys, width, numerator, denominator, budget, candidates_stride_m,
                HAS_MASK, CEIL, IN_REGISTERS, BLOCK, NUM_BLOCKS,
            )  # fmt: skip


def select_topk(scores: torch.Tensor, r: float | int, mask: torch.Tensor | None, rounding: str) -> Selection:
    """Selection of validated float32 scores `[B, M]` in one launch."""
    scores = scores.contiguous()
    batch, num_keys = scores.shape
    keep = torch.empty_like(scores, dtype=torch.bool)
    indices = torch.empty((batch, max_kept(r, num_keys, rounding)), dtype=torch.int64, device=scores.device)
    out_scores = torch.empty_like(scores)
    if batch and num_keys:
        in_registers = num_keys <= finish.MAX_ROW_IN_REGISTERS
        blocks = finish.num_blocks(num_keys)
        words_per_row = finish.num_histogram_words(num_keys)
        num_programs = batch * blocks * (1 + finish.num_selecting_phases(num_keys)) + (0 if in_registers else batch)
        check_limits(num_programs, num_keys, 0)
        with on_device(scores.device):
            _, words = workspace(0, batch * words_per_row, scores.device)
            _select_kernel[(num_programs,)](
                scores, scores if mask is None else mask, words, launch_counters(num_counters(batch), scores.device),
                keep, indices, out_scores,
                batch, num_keys, words_per_row, indices.shape[1], *keep_arguments(r, rounding),
                *((0, 0) if mask is None else mask.stride()),
                HAS_MASK=mask is not None, CEIL=rounding == "ceil", IN_REGISTERS=in_registers,
                BLOCK=finish.row_block(num_keys), NUM_BLOCKS=triton.next_power_of_2(blocks), num_warps=_NUM_WARPS,
            )  # fmt: skip
    return Selection(keep, indices, out_scores)


def keep_arguments(r: float | int, rounding: str) -> tuple[int, int, int]:
    """`(numerator, denominator, budget)` as `radix.budget_of` takes them; budget 0 means: by the fraction."""
    if isinstance(r, int):
        return 1, 1, r
    return *keep_fraction(r, rounding), 0
