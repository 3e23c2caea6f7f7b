"""Makes what the plugin puts into vLLM's encoder cache: a picture's rows and notes on them, in one row per placeholder.

vLLM slices a cached item by placeholders, a chunk of the prompt at a time, and hands the slices back. A choice that
depends on the prompt is not made yet when the item is cached; all rows of the picture are then folded into the rows
that its placeholders stand for, and found again from any slice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

NUM_AXES = 3
# Whole numbers up to 256 are exact in bfloat16, so numbers are written in three digits of that base.
_BASE = 256
_DIGITS = 3
# position, place in the item, and whether the row is visual
_NOTES = NUM_AXES + 2
NOTE_COLUMNS = _NOTES * _DIGITS
_MARK = (72, 65, 87)
# rows, width, frames, height and width of the grid
_NUMBERS = 5
_HEADER = len(_MARK) + _NUMBERS * _DIGITS


class Noted(NamedTuple):
    """Rows of a picture or video, and of the texts between a video's frames, with what is known of each.

    Attributes:
        rows: `[n, width]`.
        positions: int64 `[n, 3]`, counted from the item's corner.
        visual: bool `[n]`, False at text.
        start: the place in the item of the first row, where the rows are those that stay.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    visual: torch.Tensor
    start: int = 0

    def joined(self) -> torch.Tensor:
        """Write the notes into columns after the rows, `[n, width + NOTE_COLUMNS]`, exact in any floating dtype.

        Positions and places are in [0, 2 ** 24).
        """
        rows = self.rows
        places = self.start + torch.arange(len(rows), device=rows.device)
        notes = torch.cat([self.positions, torch.stack([places, self.visual.long()], dim=1)], dim=1)
        return torch.cat([rows, _digits(notes).flatten(1).to(rows.dtype)], dim=1)

    @classmethod
    def separated(cls, joined: torch.Tensor) -> Noted:
        """Undo `joined`, for some successive rows of what it returned."""
        notes = _numbers(joined[:, -NOTE_COLUMNS:].unflatten(1, (_NOTES, _DIGITS)))
        return cls(joined[:, :-NOTE_COLUMNS], notes[:, :NUM_AXES], notes[:, -1].bool(), int(notes[0, -2]))


class Unfolded(NamedTuple):
    """A folded item, found again from one of its slices.

    Attributes:
        rows: `[n, width]`, all rows of the item.
        grid: frames, height and width of its visual tokens.
        start: the first of its places that the slice covers.
        places: the number of its placeholders.
    """

    rows: torch.Tensor
    grid: tuple[int, int, int]
    start: int
    places: int


def fold(rows: torch.Tensor, places: int, grid: tuple[int, int, int]) -> torch.Tensor:
    """Lay rows `[n, width]` out in `places` wider rows, in memory of their own.

    Raises:
        ValueError: no places, or more rows than three digits can count.
    """
    count = len(rows)
    if not 1 <= places <= count or count >= _BASE**_DIGITS:
        raise ValueError(f"places: expected 1 to {count}, the number of rows (below {_BASE**_DIGITS}), got {places}")
    wide = -(-(_HEADER + rows.numel()) // places)
    folded = rows.new_zeros(places * wide)
    numbers = _digits(torch.tensor([*rows.shape, *grid])).flatten()
    folded[:_HEADER] = torch.cat([torch.tensor(_MARK), numbers]).to(rows.dtype)
    folded[_HEADER : _HEADER + rows.numel()] = rows.reshape(-1)
    return folded.view(places, wide)


def unfold(part: torch.Tensor) -> Unfolded:
    """Find the whole item that `part`, some of the rows that `fold` returned, was sliced from.

    Args:
        part: `[m, wide]`, a view.

    Raises:
        RuntimeError: `part` is no slice of a folded item, for example because something copied it.
    """
    wide = part.shape[1]
    places = part.untyped_storage().nbytes() // part.element_size() // wide
    whole = part.as_strided((places * wide,), (1,), 0)
    header = whole[:_HEADER].cpu()
    if header[: len(_MARK)].tolist() != list(_MARK):
        raise RuntimeError(
            "cannot find the whole picture from a part of it: expected a slice of what the plugin put into vLLM's "
            "encoder cache, got a copy; serve without the option that copies cached items, or use a method that reads "
            "no prompt, such as 'divprune'"
        )
    count, width, *grid = _numbers(header[len(_MARK) :].unflatten(0, (_NUMBERS, _DIGITS))).tolist()
    rows = whole[_HEADER : _HEADER + count * width].view(count, width)
    frames, height, breadth = grid
    return Unfolded(rows, (frames, height, breadth), part.storage_offset() // wide, places)


def _digits(numbers: torch.Tensor) -> torch.Tensor:
    """Write whole numbers in digits, int64 `[..., _DIGITS]`."""
    return torch.stack([numbers // _BASE**2, numbers // _BASE % _BASE, numbers % _BASE], dim=-1)


def _numbers(digits: torch.Tensor) -> torch.Tensor:
    """Undo `_digits`."""
    high, middle, low = digits.long().unbind(-1)
    return (high * _BASE + middle) * _BASE + low
