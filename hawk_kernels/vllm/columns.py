"""Sends what was recorded of visual tokens along with their rows, in further columns of these.

vLLM cuts the rows that leave the encoder into pictures, and gathers them from the ranks that encoded them. What stands
in the rows is cut and gathered with them, and is gone when they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FEATURES = "features"


@dataclass(frozen=True)
class Columns:
    """Lays out what was recorded of each visual token after its embedding.

    "features" are of the same dtype as the embeddings. All else is float32 and keeps its bits, so that it is as exact
    in rows of bfloat16.

    Attributes:
        shapes: the shape of what is known of one visual token, by name.
        dtype: of the rows.
    """

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Count the columns."""
        return sum(self._widths().values())

    def joined(self, rows: torch.Tensor, recorded: dict[str, torch.Tensor]) -> torch.Tensor:
        """Append to rows `[n, C]` what was recorded of them, `[n, *shape]` by name: `[n, C + count]`."""
        parts = [rows]
        for name in self.shapes:
            values = recorded[name].reshape(len(rows), -1)
            parts.append(values if name == FEATURES else values.float().contiguous().view(self.dtype))
        return torch.cat(parts, dim=1)

    def separated(self, wide: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Undo `joined`: return the rows `[n, C]` and what was recorded of them."""
        widths = self._widths()
        rows, *parts = wide.split([wide.shape[1] - self.count, *widths.values()], dim=1)
        recorded = {}
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            # a copy begins at an even place in memory, which a slice of two-byte numbers may not
            values = part if name == FEATURES else part.clone(memory_format=torch.contiguous_format).view(torch.float32)
            recorded[name] = values.reshape(len(wide), *shape)
        return rows, recorded

    def _widths(self) -> dict[str, int]:
        """Count the columns by name."""
        words = torch.float32.itemsize // self.dtype.itemsize
        return {name: math.prod(shape) * (1 if name == FEATURES else words) for name, shape in self.shapes.items()}
