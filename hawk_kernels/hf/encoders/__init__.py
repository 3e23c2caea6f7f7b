"""Vision encoders: the attention that their tokens receive, and which visual tokens of a prompt these become."""

from hawk_kernels.hf.encoders.base import VisionEncoder
from hawk_kernels.hf.encoders.families import ENCODERS
from hawk_kernels.hf.encoders.packed import PackedEncoder
from hawk_kernels.hf.encoders.pieces import Grid, Piece
from hawk_kernels.hf.encoders.tiles import TileEncoder

__all__ = ["ENCODERS", "Grid", "PackedEncoder", "Piece", "TileEncoder", "VisionEncoder"]
