"""Compaction in one launch: every program finds the tokens of its own slots and copies them.

Packed rows are aligned at their ends, so the token of a slot is found by counting kept tokens from the end of the row
down to the slot: no program needs the count of the whole row, none waits for another, and those near the end stop
early. The mask has one byte for each token, so counting it again in each program is cheap beside copying the rows.

A merge map is sorted by target, so a program finds the entries of its own slots by bisection, and sums their rows. No
two programs add to the same slot, so that no atomic is needed and the order of summation never changes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hawk_kernels.backends.kernels.launch import PreparedLaunch, launch, on_device

# A program copies the rows of this many slots at once, and this many bytes of each row: 16 KiB are in flight.
BLOCK_SLOTS = 16
_BLOCK_BYTES = 1024
# A program numbers this many tokens at once, and counts this many at once on the way to them.
_BLOCK_RANKS = 1024
_BLOCK_TOKENS = 4096
_NUM_WARPS = 8
# A program sums the rows of this many entries of a merge map at once.
_BLOCK_ENTRIES = 16
# About eight programs for each multiprocessor of an H100, so that some count while others copy.
_PROGRAMS = 1056
# Bytes that a program moves for each byte of mask that it may have to count.
_MOVED_PER_COUNTED = 4
_VARYING = (
    "keep_ptr", "positions_ptr", "packed_ptr", "keep_stride_b", "keep_stride_t",
    "positions_stride_a", "positions_stride_b", "positions_stride_t", "packed_positions_stride_a",
    "num_tokens", "length", "num_axes", "slots_per_program", "num_entries", "num_halvings",
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
    """Write the tokens of the slots from `first` up to `end`, and return the first slot that is not padding.

    The returned slot is exact if it lies among these slots, and at most `first` otherwise. The pointers are the row's.
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


@triton.jit
def _part_of_program(length, hidden_size, slots_per_program, columns_per_program):
    """Return the row of this program (int64), its first slot and the one after its last, and likewise its columns."""
    num_tiles = tl.cdiv(length, slots_per_program)
    row = (tl.program_id(0) // num_tiles).to(tl.int64)
    first = (tl.program_id(0) % num_tiles) * slots_per_program
    first_column = tl.program_id(1) * columns_per_program
    end = tl.minimum(first + slots_per_program, length)
    return row, first, end, first_column, tl.minimum(first_column + columns_per_program, hidden_size)


@triton.jit
def _find_tokens(
    keep_ptr, source_ptr, row, first, end, num_tokens, length, keep_stride_b, keep_stride_t,
    KEEP_IS_ALIGNED: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
):  # fmt: skip
    """Call `_write_sources` for one row of the mask, and make what it wrote visible to all threads of the program.

    Programs that copy other columns of the same slots write the same tokens to the same places.
    """
    if KEEP_IS_ALIGNED:
        keep_ptr = tl.multiple_of(keep_ptr + row * tl.multiple_of(keep_stride_b, 16), 16)
        keep_step: tl.constexpr = 1
    else:
        keep_ptr += row * keep_stride_b
        keep_step = keep_stride_t
    first_token = _write_sources(
        keep_ptr, source_ptr, first, end, num_tokens, length, keep_step,
        BLOCK_TOKENS, BLOCK_RANKS,
    )  # fmt: skip
    # What some threads wrote, others read.
    tl.debug_barrier()
    return first_token


@triton.jit
def _take_slots(
    positions_ptr, packed_positions_ptr, attention_mask_ptr, source_ptr, start, first_token, end, writes,
    positions_stride_a, positions_stride_t, packed_positions_stride_a, num_axes,
    HAS_POSITIONS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Return a block of slots from `start` on, whether each is below `end`, whether it holds a token, and which token.

    If `writes`, this program also writes what the slots hold besides embeddings. The pointers are the row's.
    """
    slots = start + tl.arange(0, BLOCK_SLOTS)
    inside = slots < end
    is_token = inside & (slots >= first_token)
    source = tl.load(source_ptr + slots, mask=is_token, other=0, cache_modifier=".cg")
    if writes:
        tl.store(source_ptr + slots, tl.zeros([BLOCK_SLOTS], tl.int64), mask=inside & (slots < first_token))
        tl.store(attention_mask_ptr + slots, is_token.to(tl.int64), mask=inside)
        if HAS_POSITIONS:
            for _ in range(num_axes):
                position = tl.load(positions_ptr + source * positions_stride_t, mask=is_token, other=0)
                tl.store(packed_positions_ptr + slots, position, mask=inside)
                positions_ptr += positions_stride_a
                packed_positions_ptr += packed_positions_stride_a
        else:
            tl.store(packed_positions_ptr + slots, source, mask=inside)
    return slots, inside, is_token, source


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
    row, first, end, first_column, end_column = _part_of_program(
        length, hidden_size, slots_per_program, columns_per_program
    )
    source_ptr += row * length
    first_token = _find_tokens(
        keep_ptr, source_ptr, row, first, end, num_tokens, length, keep_stride_b, keep_stride_t,
        KEEP_IS_ALIGNED, BLOCK_TOKENS, BLOCK_RANKS,
    )  # fmt: skip

    embeds_ptr += row * embeds_stride_b
    # An allocation of its own, so it is aligned. AMD's backend would compile it anew where it is larger than 2 GiB.
    packed_ptr = tl.multiple_of(packed_ptr + row * length * packed_stride_t, 16)
    for start in range(first, end, BLOCK_SLOTS):
        slots, inside, is_token, source = _take_slots(
            positions_ptr + row * positions_stride_b, packed_positions_ptr + row * length,
            attention_mask_ptr + row * length, source_ptr, start, first_token, end, first_column == 0,
            positions_stride_a, positions_stride_t, packed_positions_stride_a, num_axes, HAS_POSITIONS, BLOCK_SLOTS,
        )  # fmt: skip
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


@triton.jit
def _entries_before(target_ptr, tokens, num_entries, num_halvings):
    """Count the entries of a row whose target is below each of `tokens`; targets ascend, and padding is at the end."""
    low = tokens * 0
    high = low + num_entries
    for _ in range(num_halvings):
        middle = (low + high) // 2
        is_open = low < high
        target = tl.load(target_ptr + middle, mask=is_open, other=0)
        is_below = is_open & (target >= 0) & (target < tokens)
        low = tl.where(is_below, middle + 1, low)
        high = tl.where(is_open & (is_below == 0), middle, high)
    return low


@triton.jit
def _sum_of_entries(
    embeds_ptr, merge_source_ptr, weight_ptr, begin, end, columns, used, num_tokens, embeds_stride_t, embeds_stride_c,
    ACCUMULATOR: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum the weighted rows of the entries from `begin` up to `end`, `[BLOCK_C]`; the pointers are the row's."""
    total = tl.zeros([BLOCK_C], ACCUMULATOR)
    for start in range(begin, end, BLOCK_ENTRIES):
        entries = start + tl.arange(0, BLOCK_ENTRIES)
        token = tl.load(merge_source_ptr + entries, mask=entries < end, other=-1)
        counts = (token >= 0) & (token < num_tokens)
        weight = tl.load(weight_ptr + entries, mask=counts, other=0.0).to(ACCUMULATOR)
        values = tl.load(
            embeds_ptr + token[:, None] * embeds_stride_t + columns.to(tl.int64)[None, :] * embeds_stride_c,
            mask=counts[:, None] & used[None, :],
            other=0.0,
        )
        total += tl.sum(values.to(ACCUMULATOR) * weight[:, None], 0)
    return total


@triton.jit(do_not_specialize=_VARYING)
def _merge_kernel(
    embeds_ptr, keep_ptr, positions_ptr, packed_ptr, packed_positions_ptr, attention_mask_ptr, source_ptr,
    target_ptr, merge_source_ptr, weight_ptr,
    embeds_stride_b: tl.int64, embeds_stride_t, embeds_stride_c, keep_stride_b: tl.int64, keep_stride_t: tl.int64,
    positions_stride_a: tl.int64, positions_stride_b: tl.int64, positions_stride_t: tl.int64,
    packed_stride_t, packed_positions_stride_a: tl.int64,
    num_tokens, length, hidden_size, num_axes, slots_per_program, columns_per_program, num_entries, num_halvings,
    HAS_POSITIONS: tl.constexpr, KEEP_IS_ALIGNED: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_RANKS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compact as `_compact_kernel` does, and make those tokens sums that are targets of a merge map."""
    row, first, end, first_column, end_column = _part_of_program(
        length, hidden_size, slots_per_program, columns_per_program
    )
    source_ptr += row * length
    first_token = _find_tokens(
        keep_ptr, source_ptr, row, first, end, num_tokens, length, keep_stride_b, keep_stride_t,
        KEEP_IS_ALIGNED, BLOCK_TOKENS, BLOCK_RANKS,
    )  # fmt: skip

    embeds_ptr += row * embeds_stride_b
    target_ptr += row * num_entries
    merge_source_ptr += row * num_entries
    weight_ptr += row * num_entries
    packed_ptr = tl.multiple_of(packed_ptr + row * length * packed_stride_t, 16)
    for start in range(first, end, BLOCK_SLOTS):
        slots, inside, is_token, source = _take_slots(
            positions_ptr + row * positions_stride_b, packed_positions_ptr + row * length,
            attention_mask_ptr + row * length, source_ptr, start, first_token, end, first_column == 0,
            positions_stride_a, positions_stride_t, packed_positions_stride_a, num_axes, HAS_POSITIONS, BLOCK_SLOTS,
        )  # fmt: skip
        begins = _entries_before(target_ptr, source, num_entries, num_halvings)
        ends = _entries_before(target_ptr, source + 1, num_entries, num_halvings)
        is_target = is_token & (ends > begins)
        for start_column in range(first_column, end_column, BLOCK_C):
            columns = start_column + tl.arange(0, BLOCK_C)
            used = columns < end_column
            values = tl.load(
                embeds_ptr + source[:, None] * embeds_stride_t + columns.to(tl.int64)[None, :] * embeds_stride_c,
                mask=(is_token & (is_target == 0))[:, None] & used[None, :],
                other=0.0,
            )
            packed = packed_ptr + slots.to(tl.int64)[:, None] * packed_stride_t + columns[None, :]
            tl.store(packed, values, mask=(inside & (is_target == 0))[:, None] & used[None, :])
            for index in range(BLOCK_SLOTS):
                chosen = is_target & (tl.arange(0, BLOCK_SLOTS) == index)
                begin = tl.sum(tl.where(chosen, begins, 0), 0)
                stop = tl.sum(tl.where(chosen, ends, 0), 0)
                if stop > begin:
                    total = _sum_of_entries(
                        embeds_ptr, merge_source_ptr, weight_ptr, begin, stop, columns, used, num_tokens,
                        embeds_stride_t, embeds_stride_c, ACCUMULATOR, BLOCK_ENTRIES, BLOCK_C,
                    )  # fmt: skip
                    slot = tl.sum(tl.where(chosen, slots, 0), 0).to(tl.int64)
                    tl.store(
                        packed_ptr + slot * packed_stride_t + columns, total.to(packed_ptr.dtype.element_ty), mask=used
                    )


def _numbers(
    inputs_embeds: torch.Tensor,
    keep_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    length: int,
    config: dict[str, Any],
) -> tuple[int, ...]:
    """Return strides and sizes in the order in which both kernels take them."""
    batch, num_tokens, hidden_size = inputs_embeds.shape
    return (
        *inputs_embeds.stride(), _row_stride(keep_mask), keep_mask.stride(1),
        *((0, 0, 0) if position_ids is None else position_ids.stride()), hidden_size, batch * length,
        num_tokens, length, hidden_size, 1 if position_ids is None else len(position_ids),
        config["slots_per_program"], config["columns_per_program"],
    )  # fmt: skip


def _row_stride(keep_mask: torch.Tensor) -> int:
    """Return the stride between rows; a single row is aligned whatever its length."""
    return keep_mask.stride(0) if len(keep_mask) > 1 else 0


def _may_be_aligned(keep_mask: torch.Tensor) -> bool:
    """Tell whether every row of a mask is aligned if the first one is."""
    return keep_mask.stride(1) == 1 and _row_stride(keep_mask) % _MASK_ALIGNMENT == 0


class PreparedCall:
    """A call of one signature and length, which can be repeated with other tensors of that signature."""

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
        numbers = _numbers(inputs_embeds, keep_mask, position_ids, length, config)
        self._may_be_aligned = _may_be_aligned(keep_mask)

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
    inputs_embeds: torch.Tensor,
    keep_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    length: int,
    merge: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return packed embeddings `[B, T', C]`, positions `[A, B, T']`, mask and source `[B, T']` of valid arguments."""
    if merge is None:
        return PreparedCall(inputs_embeds, keep_mask, position_ids, length)(inputs_embeds, keep_mask, position_ids)
    batch, num_tokens, hidden_size = inputs_embeds.shape
    device = inputs_embeds.device
    num_axes, positions_dtype = (1, torch.int64) if position_ids is None else (len(position_ids), position_ids.dtype)
    packed = torch.empty((batch, length, hidden_size), dtype=inputs_embeds.dtype, device=device)
    packed_positions = torch.empty((num_axes, batch, length), dtype=positions_dtype, device=device)
    attention_mask = torch.empty((batch, length), dtype=torch.int64, device=device)
    source = torch.empty((batch, length), dtype=torch.int64, device=device)
    if batch and length:
        config = launch_config(batch, num_tokens, length, hidden_size, inputs_embeds.element_size())
        target, merge_source, weight = (part.contiguous() for part in merge)
        num_entries = target.shape[1]
        arguments = (
            inputs_embeds, keep_mask, source if position_ids is None else position_ids,
            packed, packed_positions, attention_mask, source, target, merge_source, weight,
            *_numbers(inputs_embeds, keep_mask, position_ids, length, config), num_entries, num_entries.bit_length(),
        )  # fmt: skip
        constants = {
            "HAS_POSITIONS": position_ids is not None,
            "KEEP_IS_ALIGNED": _may_be_aligned(keep_mask) and keep_mask.data_ptr() % _MASK_ALIGNMENT == 0,
            "ACCUMULATOR": tl.float64 if inputs_embeds.dtype == torch.float64 else tl.float32,
            "BLOCK_ENTRIES": _BLOCK_ENTRIES,
            **config["blocks"],
        }
        with on_device(device):
            launch(_merge_kernel, config["grid"], arguments, constants, {"num_warps": config["num_warps"]})
    return packed, packed_positions, attention_mask, source


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
