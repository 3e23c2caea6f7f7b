"""How the tiles that an encoder saw stand among the visual tokens of a prompt."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hawk_kernels.hf.encoders.pieces import Piece
from hawk_kernels.hf.hooks import upload


@dataclass(frozen=True)
class Tiles:
    """Statistics or rows of the patches of a batch of tiles.

    Attributes:
        patches: `[tiles, h, w, S]`.
        prefix: tokens of the encoder before the patches, such as CLS.
        pixels: shape of what was encoded, `[images, tiles, 3, height, width]` or `[videos, frames, ...]`, or without
            the second.
        joins: whether patches that become one visual token are set side by side, row by row, instead of averaged.
    """

    patches: torch.Tensor
    prefix: int
    pixels: torch.Size
    joins: bool = False


Layout = Callable[[Tiles, Any, dict[str, Any], Any], tuple[torch.Tensor, list[Piece]]]
"""From the tiles, the multimodal model, the arguments of its `get_image_features` and what that returned, to statistics
`[cells, S]` of the visual tokens and the pieces that these are."""


def merged_tiles(
    tiles: Tiles, multimodal: Any, arguments: dict[str, Any], features: Any
) -> tuple[torch.Tensor, list[Piece]]:
    """Lay tiles out one after the other, and merge squares of patches where the model does.

    The number of visual tokens tells how large the squares are, and whether CLS is one of the tokens.
    """
    count, height, width, _ = tiles.patches.shape
    tokens = sum(_length(feature) for feature in features.pooler_output) // count
    cells = tokens - tiles.prefix if tokens == height * width + tiles.prefix else tokens
    side = math.isqrt(height * width // max(1, cells))
    if side * side * cells != height * width or height % side or width % side:
        raise ValueError(
            f"pixel_values: expected visual tokens that stand for squares of the {height} x {width} patches of a tile, "
            f"got {tokens} tokens; use method='hawk', which leaves the vision encoder alone"
        )
    height, width = height // side, width // side
    squares = tiles.patches.reshape(count, height, side, width, side, -1).transpose(2, 3)
    merged = squares.flatten(3) if tiles.joins else squares.mean(dim=(3, 4))
    piece = Piece.of_cells(height, width)
    of_tile = [Piece.of_separators(tokens - cells), piece] if tokens > cells else [piece]
    return merged.flatten(0, 2), of_tile * count


def any_resolution(
    tiles: Tiles, multimodal: Any, arguments: dict[str, Any], features: Any
) -> tuple[torch.Tensor, list[Piece]]:
    """Lay images out as LLaVA-NeXT does: the whole image, then its tiles as one grid, with a newline after each row.

    The model itself lays the statistics out, as it does its features, and cuts off padding.
    """
    count, height, width, statistics = tiles.patches.shape
    sizes = torch.as_tensor(arguments["image_sizes"]).tolist()
    lengths = [_length(feature) for feature in features.pooler_output]
    # an image that is not cut is its patches and one newline
    uncut = height * width + 1
    tiles_of_image = [
        1 if length == uncut else _num_tiles(size, multimodal.config) for size, length in zip(sizes, lengths)
    ]

    def packed(patches: torch.Tensor, newline: torch.Tensor) -> list[torch.Tensor]:
        optional = {
            name: arguments[name] if arguments.get(name) is not None else getattr(multimodal.config, name, None)
            for name in ("vision_feature_select_strategy", "vision_aspect_ratio")
        }
        accepted = inspect.signature(multimodal.pack_image_features).parameters
        known = {name: value for name, value in optional.items() if name in accepted}
        images = torch.split(patches.flatten(1, 2), tiles_of_image)
        laid_out: list[torch.Tensor] = multimodal.pack_image_features(images, sizes, image_newline=newline, **known)[0]
        return laid_out

    # laying out an empty picture shows on the host which tokens are newlines, whatever the default device
    blank = torch.zeros(count, height, width, 1, dtype=torch.float32, device="cpu")
    empty = packed(blank, blank.new_ones(1))
    is_newline = [(image[:, 0] == 1).numpy() for image in empty]
    pieces: list[Piece] = []
    for newlines in is_newline:
        pieces.append(Piece.of_cells(height, width))
        below = newlines[height * width :]
        rows = int(below.sum())
        columns = len(below) // rows - 1
        pieces.append(Piece((1, rows, columns), below) if columns else Piece.of_separators(rows))
    values = torch.cat(packed(tiles.patches, tiles.patches.new_zeros(statistics)))
    cells = np.flatnonzero(~np.concatenate(is_newline))
    return values[upload(cells, values.device)], pieces


def pooled_frames(
    tiles: Tiles, multimodal: Any, arguments: dict[str, Any], features: Any
) -> tuple[torch.Tensor, list[Piece]]:
    """Lay videos out as LLaVA-OneVision does: frames of half the side, and a newline after each video."""
    _, height, width, _ = tiles.patches.shape
    videos, frames = tiles.pixels[:2]
    pooled = multimodal.apply_pooling(tiles.patches.flatten(1, 2))
    frame = Piece.of_cells(math.ceil(height / 2), math.ceil(width / 2))
    return pooled.flatten(0, 1), [*[frame] * frames, Piece.of_separators(1)] * videos


def _length(feature: torch.Tensor) -> int:
    """Count the visual tokens among the features `[..., hidden]` of one image."""
    return feature.shape[:-1].numel()


def _num_tiles(size: list[int], config: Any) -> int:
    """Count the tiles of an image, the whole image among them."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return int(image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size))
