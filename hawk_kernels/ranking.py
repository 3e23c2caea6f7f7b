"""Rank tokens in the one order of the package: higher values first, equal ones (`-0 == +0`) by index, NaN last."""

from __future__ import annotations

import torch

# below every key of a value, NaN included
LAST = -(1 << 33)


def order_key(values: torch.Tensor, candidates: torch.Tensor | None) -> torch.Tensor:
    """Return int64 `[B, M]` keys that sort as the float32 values do, NaN below them and non-candidates below NaN."""
    bits = (values + 0.0).view(torch.int32)  # -0 + 0 is +0
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    key = torch.where(values.isnan(), -(1 << 31) - 1, key)
    return key if candidates is None else torch.where(candidates, key, LAST)


def rank(key: torch.Tensor) -> torch.Tensor:
    """Return the place of each entry in its row, with the largest first and equal ones by index."""
    order = key.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(key.shape[1], device=key.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
