"""Encoders that see a batch of tiles of one size: CLIP, SigLIP, InternViT and their like."""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import torch

from hawk_kernels.hf.encoders.base import VisionEncoder
from hawk_kernels.hf.encoders.layouts import Layout, Tiles, merged_tiles
from hawk_kernels.hf.encoders.pieces import Piece
from hawk_kernels.ops.attention_column_mean import attention_column_mean

# transformers 5.5 passes videos as pixel_values too
_PIXELS = ("pixel_values_videos", "pixel_values")


class TileEncoder(VisionEncoder):
    """Reads encoders with embedded positions, separate projections of queries and keys, and perhaps a CLS token.

    The CLS token's query counts among the rows, as in the release of HiPrune; its own column is dropped.

    Args:
        multimodal: the model that holds the encoder.
        tower: name of the encoder in it.
        projector: path in it of the module that turns the encoder's rows into embeddings.
        merges_squares: whether the projector makes one visual token of each square of patches.
        images: how the tiles of images become visual tokens.
        videos: the same for frames.

    Raises:
        TypeError: an encoder without such layers, or with rotary positions.
    """

    projections: ClassVar[tuple[tuple[str, ...], ...]] = (("q_norm", "q_proj"), ("k_norm", "k_proj"))

    def __init__(
        self,
        multimodal: Any,
        tower: str = "vision_tower",
        projector: str = "multi_modal_projector",
        images: Layout = merged_tiles,
        videos: Layout = merged_tiles,
        merges_squares: bool = False,
    ) -> None:
        super().__init__(multimodal, tower, projector)
        self._merges_squares = merges_squares
        if "position_embeddings" in inspect.signature(self.attentions[0].forward).parameters:
            raise TypeError(
                "method: expected one that leaves the vision encoder alone, got one that reads it, and this "
                f"{type(self.tower).__name__} rotates queries and keys by position; use method='hawk'"
            )
        patch = self.tower.config.patch_size
        self._patch: int = patch if isinstance(patch, int) else patch[0]
        self._layouts = {"image": images, "video": videos}

    def received(self, layer: int, projected: list[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        attention: Any = self.attentions[layer - 1]
        queries, keys = _heads(attention, projected, arguments)
        mask = arguments.get("attention_mask")
        if mask is None:
            return attention_column_mean(queries, keys, reduction="sum", scale=attention.scale)
        return _received_without_padding(queries, keys, mask, attention.scale)

    def from_cls(self, layer: int, projected: list[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        if not self.has_cls:
            return self.received(layer, projected, arguments)
        attention: Any = self.attentions[layer - 1]
        queries, keys = _heads(attention, projected, arguments)
        return attention_column_mean(queries[:, :, :1], keys, scale=attention.scale)

    def keys(self, layer: int, projected: list[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        return _heads(self.attentions[layer - 1], projected, arguments)[1].transpose(1, 2).float()

    def visual_tokens(
        self, kind: str, arguments: dict[str, Any], features: Any, received: torch.Tensor
    ) -> tuple[torch.Tensor, list[Piece]]:
        pixels, height, width = self._patches(arguments)
        prefix = received.shape[1] - height * width
        tiles = Tiles(torch.unflatten(received[:, prefix:], 1, (height, width)), prefix, pixels)
        return self._layouts[kind](tiles, self.multimodal, arguments, features)

    def visual_rows(
        self, kind: str, arguments: dict[str, Any], features: Any, entering: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[Piece]]:
        pixels, height, width = self._patches(arguments)
        prefix = int(self.has_cls)
        rows = torch.cat(entering)
        count = rows.shape[1]
        patches = rows[:, prefix:] if count == height * width + prefix else rows
        if count < height * width:
            # the model has merged squares of patches before its projector
            side = math.isqrt(height * width // count)
            height, width = height // side, width // side
        tiles = Tiles(torch.unflatten(patches, 1, (height, width)), prefix, pixels, joins=True)
        return self._layouts[kind](tiles, self.multimodal, arguments, features)

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        if not self._merges_squares:
            return super().project(rows)
        # a square becomes the same token in any tile; only the projector of Gemma 3 takes no other than whole ones
        tokens = getattr(self.projector, "tokens_per_side", 1)
        count = len(rows)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -count % tokens**2))
        channels = self.tower.config.hidden_size
        side = math.isqrt(rows.shape[1] // channels)
        squares = rows.view(-1, tokens, tokens, side, side, channels).transpose(2, 3)
        return super().project(squares.reshape(-1, (tokens * side) ** 2, channels)).flatten(0, -2)[:count]

    def _patches(self, arguments: dict[str, Any]) -> tuple[torch.Size, int, int]:
        """Return the shape of what was encoded, and the rows and columns of patches of each tile."""
        pixels = next(arguments[name] for name in _PIXELS if arguments.get(name) is not None)
        height, width = (side // self._patch for side in pixels.shape[-2:])
        return pixels.shape, height, width


def _heads(
    attention: Any, projected: list[torch.Tensor], arguments: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split what the projections returned into queries and keys `[B, H, N, D]`."""
    shape = (*arguments["hidden_states"].shape[:2], attention.num_heads, -1)
    queries, keys = (x.reshape(shape).transpose(1, 2) for x in projected)
    return queries, keys


def _received_without_padding(
    queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Measure attention among the tokens of each tile that are not padding, 0 at padding.

    Args:
        queries: `[B, H, N, D]`.
        keys: the same shape.
        mask: `[B, 1, N, N]`, bool or added to the logits, the same keys for every query; `[B, N]` bool or 0 and 1.
        scale: factor of the logits.
    """
    seen = mask if mask.dim() == 2 else mask[:, 0, 0]
    valid = seen >= 0 if seen.dtype.is_floating_point else seen.bool()
    packed_queries, packed_keys = (x.transpose(1, 2)[valid].transpose(0, 1) for x in (queries, keys))
    segments = torch.nn.functional.pad(valid.sum(dim=1).cumsum(dim=0), (1, 0)).int()
    packed = attention_column_mean(packed_queries, packed_keys, cu_seqlens=segments, reduction="sum", scale=scale)
    return packed.new_zeros(valid.shape).masked_scatter_(valid, packed)
