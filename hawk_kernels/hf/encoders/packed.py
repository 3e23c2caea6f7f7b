"""Encoders that pack the patches of all images into one sequence: Qwen2-VL and those built like it."""

from __future__ import annotations

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
        tower: name of the encoder in it.
    """

    projections: ClassVar[tuple[tuple[str, ...], ...]] = (("qkv",),)

    def __init__(self, multimodal: Any, tower: str = "visual") -> None:
        super().__init__(multimodal, tower)
        self._merge: int = self.tower.spatial_merge_size
        has_windows = hasattr(self.tower, "fullatt_block_indexes")
        self._window = self.tower.window_size // self._merge // self.tower.patch_size if has_windows else None

    def received(self, layer: int, projected: list[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        attention: Any = self.attentions[layer - 1]
        num_key_value_heads = getattr(attention, "num_key_value_heads", attention.num_heads)
        heads = torch.unflatten(projected[0], -1, (attention.num_heads + 2 * num_key_value_heads, -1))
        queries, keys, _ = torch.split(heads, [attention.num_heads, num_key_value_heads, num_key_value_heads], dim=1)
        # GLM-OCR norms queries and keys before it rotates them
        if hasattr(attention, "q_norm"):
            queries, keys = attention.q_norm(queries), attention.k_norm(keys)
        rotated = (_rotated(x, *arguments["position_embeddings"]).transpose(0, 1) for x in (queries, keys))
        segments = arguments["cu_seqlens"].to(heads.device, torch.int32)
        return attention_column_mean(*rotated, cu_seqlens=segments, reduction="sum", scale=attention.scaling)

    def visual_tokens(
        self, kind: str, arguments: dict[str, Any], features: Any, received: torch.Tensor
    ) -> tuple[torch.Tensor, list[Piece]]:
        grids = [(t, h // self._merge, w // self._merge) for t, h, w in arguments[f"{kind}_grid_thw"].tolist()]
        merged = torch.unflatten(received, 0, (-1, self._merge**2)).mean(dim=1)
        if self._window is not None:
            place = np.argsort(_window_order(grids, self._window))
            merged = merged[upload(place, merged.device)]
        # one piece for each frame, because some models set text between frames
        return merged, [Piece.of_cells(h, w) for t, h, w in grids for _ in range(t)]


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
