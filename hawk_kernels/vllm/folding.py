"""Makes what the plugin puts into vLLM's encoder cache: a picture's rows and positions, in one row per placeholder.

vLLM slices a cached item by placeholders, a chunk of the prompt at a time, and hands the slices back. A choice that
depends on the prompt is not made yet when the item is cached; all `n` rows of the picture are then folded into the `K`
rows that its placeholders stand for, and found again from any slice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NUM_AXES = 3
# Whole numbers up to 256 are exact in bfloat16, so numbers are written in two or three digits of that base.
_BASE = 256
POSITION_COLUMNS = 2 * NUM_AXES
# Three digits that say "folded here", and then three for the number of rows.
_MARK = (72, 65, 87)
_HEADER = 6


class Unfolded(NamedTuple):
    """A folded item, found again from one of its slices.

    Attributes:
        rows: `[n, width]`, all rows of the item.
        start: the first of its `K` places that the slice covers.
        places: `K`, the number of its placeholders.
    """

    rows: torch.Tensor
    start: int
    places: int


def with_positions(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Append positions, int64 `[n, 3]` in [0, 65536), to rows `[n, C]`: `[n, C + 6]`, exact in any floating dtype."""
    digits = torch.stack([positions // _BASE, positions % _BASE], dim=2).flatten(1)
    return torch.cat([rows, digits.to(rows.device, rows.dtype)], dim=1)


def split_positions(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `with_positions`: return the rows `[n, C]` and their positions, int64 `[n, 3]`."""
    high, low = rows[:, -POSITION_COLUMNS:].long().unflatten(1, (NUM_AXES, 2)).unbind(2)
    return rows[:, :-POSITION_COLUMNS], high * _BASE + low


def fold(rows: torch.Tensor, places: int) -> torch.Tensor:
    """Lay rows `[n, width]` out in `places` wider rows, in memory of their own.

    Raises:
        ValueError: no places, or more rows than three digits can count.
    """
    count = len(rows)
    if not 1 <= places <= count or count >= _BASE**3:
        raise ValueError(f"places: expected 1 to {count}, the number of rows (below {_BASE**3}), got {places}")
    wide = -(-(_HEADER + rows.numel()) // places)
    folded = rows.new_zeros(places * wide)
    header = [*_MARK, count // _BASE**2, count // _BASE % _BASE, count % _BASE]
    folded[:_HEADER] = torch.tensor(header, dtype=rows.dtype)
    folded[_HEADER : _HEADER + rows.numel()] = rows.reshape(-1)
    return folded.view(places, wide)


def unfold(part: torch.Tensor, width: int) -> Unfolded:
    """Find the whole item that `part`, some of the rows that `fold` returned, was sliced from.

    Args:
        part: `[m, wide]`, a view.
        width: of the rows that were folded.

    Raises:
        RuntimeError: `part` is no slice of a folded item, for example because something copied it.
    """
    wide = part.shape[1]
    places = part.untyped_storage().nbytes() // part.element_size() // wide
    whole = part.as_strided((places * wide,), (1,), 0)
    mark, digits = whole[:3].tolist(), whole[3:_HEADER].tolist()
    if mark != list(_MARK):
        raise RuntimeError(
            "cannot find the whole picture from a part of it: expected a slice of what the plugin put into vLLM's "
            "encoder cache, got a copy; serve without the option that copies cached items, or use a method that reads "
            "no prompt, such as 'divprune'"
        )
    count = int(digits[0] * _BASE**2 + digits[1] * _BASE + digits[2])
    rows = whole[_HEADER : _HEADER + count * width].view(count, width)
    return Unfolded(rows, part.storage_offset() // wide, places)
