"""Selects the top-k of given scores in a defined order, in one launch: a program for each row, or several."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.kernels import finish
from hawk_kernels.backends.kernels.finish import Memory, Outputs, histograms_of_row, select
from hawk_kernels.backends.kernels.launch import check_limits
from hawk_kernels.backends.kernels.phases import arrive, counters_of_row, draw_ticket, wait_for
from hawk_kernels.backends.kernels.plan import Plan
from hawk_kernels.backends.kernels.prepared import PreparedSelection
from hawk_kernels.backends.kernels.radix import (
    Budget,
    Selected,
    clear_histograms,
    count_first_digit,
    load_candidates,
    ordered_key,
)
from hawk_kernels.backends.kernels.views import Matrix, row_of
from hawk_kernels.selection import Selection

_NUM_WARPS = 4
_CLEARED, _SCORES = (tl.constexpr(counter) for counter in range(2))
_VARYING = (
    "scores_ptr", "mask_ptr", "mask_stride_b", "mask_stride_m",
    "batch", "num_keys", "width", "numerator", "denominator", "budget",
)  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def _select_kernel(
    scores_ptr, mask_ptr, memory, outputs, mask_stride_b, mask_stride_m,
    batch, num_keys, width, numerator: tl.int64, denominator: tl.int64, budget,
    HAS_MASK: tl.constexpr, ROUNDING: tl.constexpr, STATIC: tl.constexpr,
):  # fmt: skip
    ticket = draw_ticket(memory.counters)
    blocks = tl.cdiv(num_keys, STATIC.row)
    num_clearing = 0 if STATIC.in_registers else batch
    if ticket < num_clearing:
        clear_histograms(histograms_of_row(memory.words, ticket, num_keys, STATIC.row, STATIC.in_registers))
        arrive(counters_of_row(memory.counters, ticket) + _CLEARED)
    else:
        index = ticket - num_clearing
        block = index % blocks
        row = (index // blocks) % batch
        phase = index // (blocks * batch)
        counters = counters_of_row(memory.counters, row)
        start = row.to(tl.int64) * num_keys
        histograms_ptr = histograms_of_row(memory.words, row, num_keys, STATIC.row, STATIC.in_registers)
        mask = row_of(Matrix(mask_ptr, mask_stride_b, mask_stride_m), row)
        if phase == 0:
            columns = block * STATIC.row + tl.arange(0, STATIC.row)
            candidate = load_candidates(mask, columns, num_keys, HAS_MASK)
            score = tl.load(scores_ptr + start + columns, mask=candidate, other=float("-inf"))
            tl.store(outputs.scores + start + columns, score, mask=columns < num_keys)
            if not STATIC.in_registers:
                wait_for(counters + _CLEARED, 1)
                count_first_digit(ordered_key(score, candidate), candidate, histograms_ptr)
            arrive(counters + _SCORES)
        else:
            indices_ptr = outputs.indices + row.to(tl.int64) * width
            select(
                phase - 1, block, outputs.scores + start, mask,
                Selected(outputs.mask + start, indices_ptr, num_keys, width), histograms_ptr,
                counters, counters + _SCORES, blocks, Budget(numerator, denominator, budget),
                HAS_MASK, ROUNDING, STATIC.in_registers, STATIC.row, STATIC.num_blocks,
            )  # fmt: skip


@lru_cache(maxsize=4096)
def make_plan(batch: int, num_keys: int) -> Plan:
    """Make the plan of a launch; its scores are given, so no heads are summed."""
    blocks = finish.blocks_of(num_keys, sum_block=1)
    num_programs = batch * finish.num_blocks(num_keys) * (1 + finish.num_selecting_phases(num_keys))
    num_programs += 0 if blocks.in_registers else batch
    check_limits(num_programs, num_keys, 0, batch)
    return Plan(
        grid=(num_programs,),
        num_floats=0,
        num_words=batch * finish.num_histogram_words(num_keys),
        sizes=(batch, num_keys),
        static=blocks,
        options={"num_warps": _NUM_WARPS},
    )


class PreparedCall(PreparedSelection):
    """A call of `select_topk`."""

    def __init__(
        self, scores: torch.Tensor, r: float | int, mask: torch.Tensor | None, rounding: str, batched: bool = True
    ) -> None:
        """Prepare a call by validated float32 scores `[B, M]`; unless batched, the results have no batch axis."""
        batch, num_keys = scores.shape
        super().__init__(scores.device, batch, num_keys, r, rounding, batched)
        if self.is_empty:
            return
        plan = make_plan(batch, num_keys)
        mask_strides = (0, 0) if mask is None else mask.stride()
        numbers = *mask_strides, *plan.sizes, *self.budget

        def arrange(
            floats: Any, words: Any, counters: Any, out_scores: Any, keep: Any, indices: Any, scores: Any, mask: Any
        ) -> tuple[Any, ...]:
            return scores, mask, Memory(floats, words, counters), Outputs(out_scores, keep, indices), *numbers

        constants = {"HAS_MASK": mask is not None, "ROUNDING": rounding, "STATIC": plan.static}
        # all but the scores and their mask are specialised
        self.prepare(plan, batch, arrange, constants, num_specialized=6)

    def __call__(self, scores: torch.Tensor, mask: torch.Tensor | None) -> Selection:
        """Return mask, indices and scores."""
        scores = scores.contiguous()
        return self.run(_select_kernel, (), (scores, scores if mask is None else mask))


def select_topk(scores: torch.Tensor, r: float | int, mask: torch.Tensor | None, rounding: str) -> Selection:
    """Select from validated float32 scores `[B, M]` in one launch."""
    return PreparedCall(scores, r, mask, rounding)(scores, mask)
