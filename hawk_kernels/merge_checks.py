"""Checks of merge maps, which `compact` and `prune` share."""

from __future__ import annotations

import torch

from hawk_kernels.selection import LAST_PLACE, Merge
from hawk_kernels.validation import check_tensor, shape_of


def check_merge(name: str, merge: object, rows: tuple[int, ...], device: torch.device) -> None:
    """Check the types, dtypes, shapes and devices of a map for tokens of `rows`, `(B, T)` or `(T,)`.

    Raises:
        TypeError: no `Merge`, or tensors of another type or dtype.
        ValueError: a shape or device does not fit.
    """
    if not isinstance(merge, Merge):
        raise TypeError(
            f"{name}: expected a Merge or None, got {type(merge).__name__}; take the one of hawk_kernels.selection"
        )
    dtypes = {"target": torch.int64, "source": torch.int64, "weight": torch.float32}
    for field, dtype in dtypes.items():
        part = getattr(merge, field)
        label = f"{name}.{field}"
        check_tensor(label, part)
        if part.dtype != dtype:
            raise TypeError(f"{label}: expected dtype {dtype}, got {part.dtype}; use {label}.to({dtype})")
        if part.dim() != len(rows) or part.shape[:-1] != rows[:-1]:
            expected = f"[{', '.join(map(str, (*rows[:-1], 'E')))}]"
            raise ValueError(
                f"{label}: expected shape {expected}, got {shape_of(part)}; pad rows with fewer entries by a target of "
                "-1"
            )
        if part.shape != merge.target.shape:
            raise ValueError(
                f"{label}: expected the shape of {name}.target, {shape_of(merge.target)}, got {shape_of(part)}; one "
                "entry has one of each"
            )
        if part.device != device:
            device_name = str(device)
            raise ValueError(
                f"{label}: expected device {device_name}, got {part.device}; use {label}.to({device_name!r})"
            )


def check_entries(
    name: str, merge: Merge, kept: torch.Tensor, sources: torch.Tensor | None = None, ordered: bool = True
) -> None:
    """Check the entries of a map `[B, E]` on a CPU, where reading them costs no synchronisation.

    Args:
        name: what errors call the map.
        merge: the map.
        kept: bool `[B, T]`, the tokens that stay.
        sources: bool `[B, T]`, the tokens that may be added; None means all.
        ordered: whether the targets have to ascend.

    Raises:
        ValueError: a target or source that no row has, a source that may not be added, a target that is dropped, or
            targets out of order.
    """
    num_tokens = kept.shape[1]
    listed = merge.target != -1
    for field, places in (("target", merge.target), ("source", merge.source)):
        outside = listed & ((places < 0) | (places >= num_tokens))
        if outside.any():
            place = int(places[outside][0])
            raise ValueError(
                f"{name}.{field}: expected places of the {num_tokens} tokens of a row, from 0 to {num_tokens - 1}, got "
                f"{place}; a target of -1 is padding"
            )
    if not bool(listed.any()):
        return
    dropped = listed & ~kept.gather(1, merge.target.clamp(min=0))
    if dropped.any():
        row, entry = (int(place) for place in dropped.nonzero()[0])
        raise ValueError(
            f"{name}.target: expected kept tokens, got {int(merge.target[row, entry])} in row {row}, which is dropped; "
            "a target of -1 is padding"
        )
    if sources is not None:
        padding = listed & ~sources.gather(1, torch.where(listed, merge.source, 0))
        if padding.any():
            row, entry = (int(place) for place in padding.nonzero()[0])
            raise ValueError(
                f"{name}.source: expected visual tokens of the row, got {int(merge.source[row, entry])} in row {row}, "
                "which is padding; view.candidates marks the visual tokens"
            )
    places = torch.where(listed, merge.target, LAST_PLACE)
    if ordered and bool((places[:, 1:] < places[:, :-1]).any()):
        raise ValueError(
            f"{name}.target: expected targets in ascending order in each row, padding at the end, got others; use "
            f"{name}.ordered()"
        )
