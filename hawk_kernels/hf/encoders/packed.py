"""Encoders that pack the patches of all images into one sequence: Qwen2-VL and those built like it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from hawk_kernels.hf.encoders.base import VisionEncoder
from hawk_kernels.hf.encoders.pieces import Grid, Piece
from hawk_kernels.hf.hooks import upload
from hawk_kernels.ops.attention_column_mean import attention_column_mean


class PackedEncoder(VisionEncoder):
    """Reads encoders with patches in the order of their merges, RoPE, and attention within each frame or window.

    Args:
        multimodal: the model that holds the encoder.
        tower: name of the encoder in it; its `merger` makes the embeddings.
    """

    projections: ClassVar[tuple[tuple[str, ...], ...]] = (("qkv",),)

    def __init__(self, multimodal: Any, tower: str = "visual") -> None:
        super().__init__(multimodal, tower, f"{tower}.merger")
        self._merge: int = self.tower.spatial_merge_size
        has_windows = hasattr(self.tower, "fullatt_block_indexes")
        self._window = self.tower.window_size // self._merge // self.tower.patch_size if has_windows else None

    def received(self, layer: int, projected: list[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        attention: Any = self.attentions[layer - 1]
        queries, keys = _queries_and_keys(attention, projected)
        rotated = (_rotated(x, *arguments["position_embeddings"]).transpose(0, 1) for x in (queries, keys))
        segments = arguments["cu_seqlens"].to(keys.device, torch.int32)
        return attention_column_mean(*rotated, cu_seqlens=segments, reduction="sum", scale=attention.scaling)

    def keys(self, layer: int, projected: list[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        return _queries_and_keys(self.attentions[layer - 1], projected)[1].float()

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        # the merger sets the patches of a visual token side by side itself, after a norm of each
        patches = rows if hasattr(self.tower, "downsample") else torch.unflatten(rows, 1, (self._merge**2, -1))
        return super().project(patches.flatten(0, -2))

    def visual_tokens(
        self, kind: str, arguments: dict[str, Any], features: Any, received: torch.Tensor
    ) -> tuple[torch.Tensor, list[Piece]]:
        grids = self._grids(kind, arguments)
        merged = torch.unflatten(received, 0, (-1, self._merge**2)).mean(dim=1)
        return self._in_order(merged, grids), _frames(grids)

    def visual_rows(
        self, kind: str, arguments: dict[str, Any], features: Any, entering: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[Piece]]:
        grids = self._grids(kind, arguments)
        rows = torch.cat([rows.flatten(0, -2) for rows in entering])
        # GLM-4V merges patches before its merger, so that one row of its own enters for each visual token
        return self._in_order(rows.reshape(sum(math.prod(grid) for grid in grids), -1), grids), _frames(grids)

    def _grids(self, kind: str, arguments: dict[str, Any]) -> list[Grid]:
        """Return the grid of visual tokens of each image or video."""
        return [(t, h // self._merge, w // self._merge) for t, h, w in arguments[f"{kind}_grid_thw"].tolist()]

    def _in_order(self, merged: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
        """Turn the order of windows, in which the encoder works, into that of the visual tokens."""
        if self._window is None:
            return merged
        return merged[upload(np.argsort(_window_order(grids, self._window)), merged.device)]


def _frames(grids: list[Grid]) -> list[Piece]:
    """Make one piece for each frame, because some models set text between frames."""
    return [Piece.of_cells(h, w) for t, h, w in grids for _ in range(t)]


def _queries_and_keys(attention: Any, projected: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Split what the joint projection returned into queries `[T, H, D]` and keys `[T, Hkv, D]`, not rotated yet."""
    num_key_value_heads = getattr(attention, "num_key_value_heads", attention.num_heads)
    heads = torch.unflatten(projected[0], -1, (attention.num_heads + 2 * num_key_value_heads, -1))
    queries, keys, _ = torch.split(heads, [attention.num_heads, num_key_value_heads, num_key_value_heads], dim=1)
    # GLM-OCR norms queries and keys before it rotates them
    if hasattr(attention, "q_norm"):
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    return queries, keys


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `[T, H, D]` by angles `[T, D]` in float32; the halves of a head are real and imaginary parts."""
    real, imaginary = x.float().chunk(2, dim=-1)
    turned = torch.cat([-imaginary, real], dim=-1)
    return (x.float() * cos.float().unsqueeze(1) + turned * sin.float().unsqueeze(1)).to(x.dtype)


def _window_order(grids: Sequence[Grid], side: int) -> np.ndarray:
    """Order visual tokens as windowed attention does: window by window within each frame, int64 `[M]`."""
    orders, start = [], 0
    for frames, height, width in grids:
        frame, row, column = np.indices((frames, height, width)).reshape(3, -1)
        # the last key counts most; equal windows stay in the order of the image
        orders.append(np.lexsort((column // side, row // side, frame)) + start)
        start += frames * height * width
    return np.concatenate(orders)
