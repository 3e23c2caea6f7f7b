"""Compaction in one launch: every program finds the tokens of its own slots and copies them.

Packed rows are aligned at their ends, so the token of a slot is found by counting kept tokens from the end of the row
down to the slot: no program needs the count of the whole row, none waits for another, and those near the end stop
early. The mask is a byte a token, so counting it again in each program is cheap beside the rows that are copied.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.kernels.launch import PreparedLaunch, on_device

# Slots whose rows a program copies at once, and bytes of each: 16 KiB on their way.
BLOCK_SLOTS = 16
_BLOCK_BYTES = 1024
# Tokens that are numbered at once, and that are counted at once on the way there.
_BLOCK_RANKS = 1024
_BLOCK_TOKENS = 4096
_NUM_WARPS = 8
# About eight for each multiprocessor of H100, so that some count while others copy.
_PROGRAMS = 1056
# Bytes that a program moves for each byte of mask that it may have to count.
_MOVED_PER_COUNTED = 4
_VARYING = (
    "keep_ptr", "positions_ptr", "packed_ptr", "keep_stride_b", "keep_stride_t",
    "positions_stride_a", "positions_stride_b", "positions_stride_t", "packed_positions_stride_a",
    "num_tokens", "length", "num_axes", "slots_per_program",
)  # fmt: skip
# Bytes of a mask that are one load where a row begins at a multiple of them.
_MASK_ALIGNMENT = 16


@triton.jit
def _load_kept(keep_ptr, start, num_tokens, stride, BLOCK: tl.constexpr):
    """Return 1 at tokens from `start` on that stay, int32; `keep_ptr` is the row's."""
    tokens = start + tl.arange(0, BLOCK)
    keep_ptrs = keep_ptr + tokens.to(tl.int64) * stride
    if start + BLOCK <= num_tokens:
        # Without a mask, 16 tokens are one load whatever the length of the row.
        kept = tl.load(keep_ptrs)
    else:
        kept = tl.load(keep_ptrs, mask=tokens < num_tokens, other=0)
    return (kept != 0).to(tl.int32)


@triton.jit
def _number_tokens(
    keep_ptr, source_ptr, start, stop, counted, first, end, num_tokens, length, keep_stride_t,
    BLOCK_RANKS: tl.constexpr,
):  # fmt: skip
    """Write those kept tokens from `start` up to `stop` that have a slot from `first` up to `end`.

    `counted` tokens are kept from `stop` on. The pointers are the row's.
    """
    while (stop > start) & (counted < length - first):
        stop -= BLOCK_RANKS
        kept = _load_kept(keep_ptr, stop, num_tokens, keep_stride_t, BLOCK_RANKS)
        counted += tl.sum(kept, 0)
        tokens = stop + tl.arange(0, BLOCK_RANKS)
        slots = length - counted + tl.cumsum(kept, 0) - 1
        tl.store(source_ptr + slots, tokens.to(tl.int64), mask=(kept > 0) & (slots >= first) & (slots < end))


@triton.jit
def _write_sources(
    keep_ptr, source_ptr, first, end, num_tokens, length, keep_stride_t,
    BLOCK_TOKENS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
):  # fmt: skip
    """Write the tokens of the slots from `first` up to `end`; returns the first slot that is no padding.

    That is exact where it lies among these slots, and at most `first` otherwise. The pointers are the row's.
    """
    counted = first * 0
    start = (tl.cdiv(num_tokens, BLOCK_TOKENS) - 1) * BLOCK_TOKENS
    while (start >= 0) & (counted < length - first):
        kept_here = tl.sum(_load_kept(keep_ptr, start, num_tokens, keep_stride_t, BLOCK_TOKENS), 0)
        if counted + kept_here > length - end:
            stop = tl.minimum(start + BLOCK_TOKENS, tl.cdiv(num_tokens, BLOCK_RANKS) * BLOCK_RANKS)
            _number_tokens(
                keep_ptr, source_ptr, start, stop, counted, first, end, num_tokens, length, keep_stride_t,
                BLOCK_RANKS,
            )  # fmt: skip
        counted += kept_here
        start -= BLOCK_TOKENS
    return length - counted


@triton.jit(do_not_specialize=_VARYING)
def _compact_kernel(
    embeds_ptr, keep_ptr, positions_ptr, packed_ptr, packed_positions_ptr, attention_mask_ptr, source_ptr,
    embeds_stride_b: tl.int64, embeds_stride_t, embeds_stride_c, keep_stride_b: tl.int64, keep_stride_t: tl.int64,
    positions_stride_a: tl.int64, positions_stride_b: tl.int64, positions_stride_t: tl.int64,
    packed_stride_t, packed_positions_stride_a: tl.int64,
    num_tokens, length, hidden_size, num_axes, slots_per_program, columns_per_program,
    HAS_POSITIONS: tl.constexpr, KEEP_IS_ALIGNED: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(length, slots_per_program)
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    first = (tl.program_id(0) % num_tiles) * slots_per_program
    end = tl.minimum(first + slots_per_program, length)
    first_column = tl.program_id(1) * columns_per_program
    end_column = tl.minimum(first_column + columns_per_program, hidden_size)

    if KEEP_IS_ALIGNED:
        keep_ptr = tl.multiple_of(keep_ptr + row * tl.multiple_of(keep_stride_b, 16), 16)
        keep_step: tl.constexpr = 1
    else:
        keep_ptr += row * keep_stride_b
        keep_step = keep_stride_t
    # Programs with other columns of these slots write the same tokens here.
    source_ptr += row * length
    first_token = _write_sources(
        keep_ptr, source_ptr, first, end, num_tokens, length, keep_step,
        BLOCK_TOKENS, BLOCK_RANKS,
    )  # fmt: skip
    # What some threads wrote, others read.
    tl.debug_barrier()

    embeds_ptr += row * embeds_stride_b
    # An allocation of its own, so it is aligned. AMD's backend would compile it anew where it is larger than 2 GiB.
    packed_ptr = tl.multiple_of(packed_ptr + row * length * packed_stride_t, 16)
    for start in range(first, end, BLOCK_SLOTS):
        slots = start + tl.arange(0, BLOCK_SLOTS)
        inside = slots < end
        is_token = inside & (slots >= first_token)
        source = tl.load(source_ptr + slots, mask=is_token, other=0, cache_modifier=".cg")
        if first_column == 0:
            zero = tl.zeros([BLOCK_SLOTS], tl.int64)
            tl.store(source_ptr + slots, zero, mask=inside & (slots < first_token))
            tl.store(attention_mask_ptr + row * length + slots, is_token.to(tl.int64), mask=inside)
            if HAS_POSITIONS:
                axis_ptr = positions_ptr + row * positions_stride_b
                packed_axis_ptr = packed_positions_ptr + row * length
                for _ in range(num_axes):
                    position = tl.load(axis_ptr + source * positions_stride_t, mask=is_token, other=0)
                    tl.store(packed_axis_ptr + slots, position, mask=inside)
                    axis_ptr += positions_stride_a
                    packed_axis_ptr += packed_positions_stride_a
            else:
                tl.store(packed_positions_ptr + row * length + slots, source, mask=inside)
        for start_column in range(first_column, end_column, BLOCK_C):
            columns = start_column + tl.arange(0, BLOCK_C)
            used = (columns < end_column)[None, :]
            values = tl.load(
                embeds_ptr + source[:, None] * embeds_stride_t + columns.to(tl.int64)[None, :] * embeds_stride_c,
                mask=is_token[:, None] & used,
                other=0.0,
            )
            packed = packed_ptr + slots.to(tl.int64)[:, None] * packed_stride_t + columns[None, :]
            tl.store(packed, values, mask=inside[:, None] & used)


class PreparedCall:
    """A call of one signature and length, which can be made again with other tensors of it."""

    def __init__(
        self,
        inputs_embeds: torch.Tensor,
        keep_mask: torch.Tensor,
        position_ids: torch.Tensor | None,
        length: int,
        batched: bool = True,
        has_axes: bool = True,
    ) -> None:
        """Prepare a call by valid embeddings `[B, T, C]`, a mask `[B, T]` and positions `[A, B, T]`.

        The results have a batch axis if `batched`, and the positions an axis of RoPE's axes if `has_axes`.
        """
        batch, num_tokens, hidden_size = inputs_embeds.shape
        num_axes = 1 if position_ids is None else len(position_ids)
        self._device = inputs_embeds.device
        self._dtype = inputs_embeds.dtype
        self._positions_dtype = torch.int64 if position_ids is None else position_ids.dtype
        self._shape = (batch, length) if batched else (length,)
        self._packed_shape = (*self._shape, hidden_size)
        self._positions_shape = (num_axes, *self._shape) if has_axes else self._shape
        self._may_be_aligned = False
        self._launches: dict[bool, PreparedLaunch] = {}
        if batch == 0 or length == 0:
            return
        config = launch_config(batch, num_tokens, length, hidden_size, inputs_embeds.element_size())
        # A single row is aligned whatever its length.
        keep_stride_b = keep_mask.stride(0) if batch > 1 else 0
        keep_stride_t = keep_mask.stride(1)
        self._may_be_aligned = keep_stride_t == 1 and keep_stride_b % _MASK_ALIGNMENT == 0
        numbers = (
            *inputs_embeds.stride(), keep_stride_b, keep_stride_t,
            *((0, 0, 0) if position_ids is None else position_ids.stride()), hidden_size, batch * length,
            num_tokens, length, hidden_size, num_axes, config["slots_per_program"], config["columns_per_program"],
        )  # fmt: skip

        def arrange(
            embeds: Any, packed_positions: Any, attention_mask: Any, source: Any,
            packed: Any, keep_mask: Any, positions: Any,
        ) -> tuple[Any, ...]:  # fmt: skip
            return embeds, keep_mask, positions, packed, packed_positions, attention_mask, source, *numbers

        has_positions = position_ids is not None
        for is_aligned in (False, True):
            constants = {"HAS_POSITIONS": has_positions, "KEEP_IS_ALIGNED": is_aligned, **config["blocks"]}
            options = {"num_warps": config["num_warps"]}
            # all but the packed embeddings, the mask and the positions are specialised
            self._launches[is_aligned] = PreparedLaunch(config["grid"], arrange, constants, options, num_specialized=4)

    def __call__(
        self, inputs_embeds: torch.Tensor, keep_mask: torch.Tensor, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return packed embeddings `[B, T', C]`, positions `[A, B, T']`, mask and source `[B, T']`."""
        device = self._device
        packed = torch.empty(self._packed_shape, dtype=self._dtype, device=device)
        packed_positions = torch.empty(self._positions_shape, dtype=self._positions_dtype, device=device)
        attention_mask = torch.empty(self._shape, dtype=torch.int64, device=device)
        source = torch.empty(self._shape, dtype=torch.int64, device=device)
        if self._launches:
            keep_is_aligned = self._may_be_aligned and keep_mask.data_ptr() % _MASK_ALIGNMENT == 0
            with on_device(device):
                self._launches[keep_is_aligned](
                    _compact_kernel, inputs_embeds, packed_positions, attention_mask, source,
                    packed, keep_mask, source if position_ids is None else position_ids,
                )  # fmt: skip
        return packed, packed_positions, attention_mask, source


def compact(
    inputs_embeds: torch.Tensor, keep_mask: torch.Tensor, position_ids: torch.Tensor | None, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return packed embeddings `[B, T', C]`, positions `[A, B, T']`, mask and source `[B, T']` of valid arguments."""
    return PreparedCall(inputs_embeds, keep_mask, position_ids, length)(inputs_embeds, keep_mask, position_ids)


def launch_config(batch: int, num_tokens: int, length: int, hidden_size: int, element_size: int) -> dict[str, Any]:
    """Choose grid and block sizes.

    A program copies a few whole rows, parts of rows where there are few, and more rows where the mask is long.
    """
    block_columns = min(_BLOCK_BYTES // element_size, max(16, triton.next_power_of_2(hidden_size)))
    num_tiles = batch * triton.cdiv(length, BLOCK_SLOTS)
    moved_per_tile = 2 * BLOCK_SLOTS * hidden_size * element_size
    tiles_for_counting = triton.cdiv(_MOVED_PER_COUNTED * num_tokens, max(1, moved_per_tile))
    slots_per_program = BLOCK_SLOTS * max(1, min(tiles_for_counting, num_tiles // _PROGRAMS))
    num_programs = batch * triton.cdiv(length, slots_per_program)
    column_blocks = max(1, triton.cdiv(hidden_size, block_columns))
    splits = min(column_blocks, max(1, _PROGRAMS // num_programs))
    columns_per_program = block_columns * triton.cdiv(column_blocks, splits)
    return {
        "grid": (num_programs, triton.cdiv(column_blocks * block_columns, columns_per_program)),
        "slots_per_program": slots_per_program,
        "columns_per_program": columns_per_program,
        "num_warps": _NUM_WARPS,
        "blocks": {
            "BLOCK_TOKENS": _BLOCK_TOKENS,
            "BLOCK_RANKS": _BLOCK_RANKS,
            "BLOCK_SLOTS": BLOCK_SLOTS,
            "BLOCK_C": block_columns,
        },
    }
