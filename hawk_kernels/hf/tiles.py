"""Tells which tile of its picture each visual token comes from, so that each tile can have a budget of its own.

Some processors write text between the tiles. Some encoders return one entry for each tile, and the prompt has these one
after the other. LLaVA-NeXT and its relatives lay the tiles of a picture out as one grid, line by line, with a newline
after each line: there the model's own code lays out tile numbers in place of features.
"""

from __future__ import annotations

import inspect
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.families import FAMILIES
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.hf.sources import Encoded

Layout = tuple[np.ndarray, np.ndarray]
"""The visual tokens of a picture: int64 `[tokens]`, the number of each one's tile, and bool `[tokens]`, True at
newlines."""


def check_tiles(anatomy: Anatomy) -> None:
    """Refuse a family whose pictures are not cut into tiles.

    Raises:
        TypeError: the family does not cut pictures into tiles.
    """
    if anatomy.family.tiles is None:
        names = ", ".join(family.model_type for family in FAMILIES if family.tiles is not None)
        raise TypeError(
            f"budget: expected 'shared' or 'per_image' for {anatomy.family.model_type}, got 'per_tile'; pictures are "
            f"cut into tiles in {names}"
        )


def with_tiles(anatomy: Anatomy, prompt: Prompt, encoded: dict[str, Encoded]) -> Prompt:
    """Return the same prompt with the tile of each placeholder, and with its newlines as separators.

    A newline belongs to the tile of the token before it. A video that is not encoded as tiles is one tile.

    Args:
        anatomy: the model's parts.
        prompt: the prompt on the host; `generate` may repeat each sample in several equal rows.
        encoded: arguments and results of the vision encoder, by kind.

    Raises:
        ValueError: the encoder reports no tiles, or tiles that do not fit the prompt.
    """
    placeholders = prompt.all_placeholders()
    numbers, separators = np.full(prompt.ids.shape, -1), np.zeros(prompt.ids.shape, dtype=bool)
    if anatomy.family.tiles == "runs":
        for row in range(len(prompt.ids)):
            for number, run in enumerate(prompt.whole_images(row)):
                numbers[row, run] = number
        return replace(prompt, tiles=numbers, separators=separators)
    layouts = {kind: deque(_layouts(anatomy, kind, run)) for kind, run in encoded.items()}
    copies = prompt.copies_of_rows(sum(len(tiles) for queue in layouts.values() for tiles, _ in queue))
    for row in range(0, len(prompt.ids), copies):
        positions, before = np.flatnonzero(placeholders[row]), 0
        while positions.size:
            kind = anatomy.kinds[int(prompt.ids[row, positions[0]])]
            # some models mark the frames of a video as images
            queue = layouts.get(kind) or next((other for other in layouts.values() if other), None)
            tiles, newlines = queue.popleft() if queue else (positions[:0], positions[:0])
            if not 0 < tiles.size <= positions.size:
                raise _unknown(f"a row of {int(placeholders[row].sum())} visual tokens that they do not fill")
            here, positions = positions[: tiles.size], positions[tiles.size :]
            numbers[row : row + copies, here] = before + tiles
            separators[row : row + copies, here] = newlines
            before += int(tiles.max()) + 1
    if any(layouts.values()):
        raise _unknown("more of them than the prompt has places for")
    return replace(prompt, tiles=numbers, separators=separators)


def grids_of_tiles(prompt: Prompt, row: int) -> list[tuple[int, int] | None]:
    """Find the height and width of each tile of a row of a prompt; None for a tile without newlines in it.

    Args:
        prompt: a prompt with `tiles`.
        row: index of the row in the batch.
    """
    assert prompt.separators is not None
    lines = np.cumsum(prompt.separators[row])
    visible = prompt.candidates()
    grids: list[tuple[int, int] | None] = []
    for unit in visible.units(row):
        height = np.unique(lines[unit]).size
        is_cut = height > 1 and len(unit) % height == 0
        grids.append((height, len(unit) // height) if is_cut else None)
    return grids


def _layouts(anatomy: Anatomy, kind: str, run: Encoded) -> list[Layout]:
    """Lay out the entries of one kind that the encoder returned."""
    if not run.lengths:
        raise _unknown(f"{kind} features without one entry for each")
    if anatomy.family.tiles == "mosaic" and kind == "image":
        return _mosaics(anatomy.multimodal, run)
    return [(np.zeros(length, dtype=np.int64), np.zeros(length, dtype=bool)) for length in run.lengths]


def _mosaics(multimodal: Any, run: Encoded) -> list[Layout]:
    """Lay out pictures as LLaVA-NeXT does: the whole picture, then its tiles as one grid with newlines.

    Raises:
        ValueError: the model lays out other numbers of tokens than the encoder returned.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    config = multimodal.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    optional = {
        name: run.arguments[name] if run.arguments.get(name) is not None else getattr(config, name, None)
        for name in ("vision_feature_select_strategy", "vision_aspect_ratio")
    }
    accepted = inspect.signature(multimodal.pack_image_features).parameters
    known = {name: value for name, value in optional.items() if name in accepted}
    made: list[Layout] = []
    for size, length in zip(torch.as_tensor(run.arguments["image_sizes"]).tolist(), run.lengths):
        if length == side * side + 1:
            # a picture that is not cut is its patches and one newline
            newlines = np.arange(length) == length - 1
            made.append((np.zeros(length, dtype=np.int64), newlines))
            continue
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        # row and column of each tile, and whether a token is a newline; row 0 is the whole picture
        probe = torch.zeros(1 + rows * columns, side * side, 3, dtype=torch.float32, device="cpu")
        number = torch.arange(rows * columns, device="cpu")
        probe[1:, :, 0] = 1 + (number // columns).unsqueeze(1)
        probe[1:, :, 1] = (number % columns).unsqueeze(1)
        newline = probe.new_tensor([0.0, 0.0, 1.0])
        laid_out = multimodal.pack_image_features([probe], [size], image_newline=newline, **known)[0][0]
        if len(laid_out) != length:
            raise _unknown(f"a picture of {length} visual tokens, where the model lays out {len(laid_out)}")
        # large grids are scaled down, which mixes neighbouring tiles
        row, column, is_newline = laid_out.round().long().unbind(dim=1)
        tiles = torch.where(row > 0, 1 + (row - 1) * columns + column, 0).numpy()
        newlines = is_newline.numpy() == 1
        before = np.maximum.accumulate(np.where(newlines, 0, np.arange(length)))
        # the model cuts tiles of padding away, so the others are numbered without gaps
        _, tiles = np.unique(tiles[before], return_inverse=True)
        made.append((tiles, newlines))
    return made


def _unknown(came: str) -> ValueError:
    return ValueError(
        f"budget: expected pictures whose tiles the vision encoder tells, got {came}; pass budget='per_image'"
    )
