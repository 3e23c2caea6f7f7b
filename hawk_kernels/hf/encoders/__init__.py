"""Vision encoders: how much attention their tokens receive, and which visual tokens of a prompt these become."""

from hawk_kernels.hf.encoders.base import VisionEncoder
from hawk_kernels.hf.encoders.layouts import any_resolution, pooled_frames
from hawk_kernels.hf.encoders.packed import PackedEncoder
from hawk_kernels.hf.encoders.pieces import Grid, Piece
from hawk_kernels.hf.encoders.tiles import TileEncoder

__all__ = ["Grid", "PackedEncoder", "Piece", "TileEncoder", "VisionEncoder", "any_resolution", "pooled_frames"]
