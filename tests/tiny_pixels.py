"""What the processors of families hand over for the pictures of a batch, with random pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.tiny_models import Picture

Pixels = Callable[[list[list[Picture]], torch.Generator], dict[str, torch.Tensor]]


def flat(rows: list[list[Picture]]) -> list[Picture]:
    return [picture for row in rows for picture in row]


def squares(size: int, *shape: int, **more: Callable[[int], torch.Tensor]) -> Pixels:
    """`pixel_values` `[images, *shape, 3, size, size]`, and what `more` makes of the number of images."""

    def pixels(rows: list[list[Picture]], generator: torch.Generator) -> dict[str, torch.Tensor]:
        count = len(flat(rows))
        values = torch.randn(count, *shape, 3, size, size, generator=generator)
        return {"pixel_values": values, **{name: make(count) for name, make in more.items()}}

    return pixels


def padded_squares(size: int, tiles: bool = False) -> Pixels:
    """`pixel_values` `[rows, images of the longest row, 3, size, size]`, zero where a row has fewer.

    With `tiles` the mask says which images are there, else which pixels.
    """

    def pixels(rows: list[list[Picture]], generator: torch.Generator) -> dict[str, torch.Tensor]:
        most = max(map(len, rows))
        values = torch.zeros(len(rows), most, 3, size, size)
        for row, pictures in enumerate(rows):
            values[row, : len(pictures)] = torch.randn(len(pictures), 3, size, size, generator=generator)
        mask = torch.ones(len(rows), most, size, size).bool()
        if tiles:
            mask = torch.tensor([[image < len(pictures) for image in range(most)] for pictures in rows])
        return {"pixel_values": values, "pixel_attention_mask": mask}

    return pixels


def with_clips(images: Pixels, size: int) -> Pixels:
    """`images`, and videos as `pixel_values_videos` `[videos, frames, 3, size, size]`."""

    def pixels(rows: list[list[Picture]], generator: torch.Generator) -> dict[str, torch.Tensor]:
        stills = [[picture for picture in row if picture.frames == 1] for row in rows]
        clips = [picture for picture in flat(rows) if picture.frames > 1]
        inputs = images(stills, generator) if flat(stills) else {}
        if clips:
            shape = (len(clips), clips[0].frames, 3, size, size)
            inputs["pixel_values_videos"] = torch.randn(*shape, generator=generator)
        return inputs

    return pixels


def named_squares(size: int, *names: str) -> Pixels:
    """Squares under other names, the first of `size`, each further one four times as wide."""

    def pixels(rows: list[list[Picture]], generator: torch.Generator) -> dict[str, torch.Tensor]:
        count = len(flat(rows))
        return {
            name: torch.randn(count, 3, size * 4**i, size * 4**i, generator=generator) for i, name in enumerate(names)
        }

    return pixels


def patch_rows(patch: int, **names: str) -> Pixels:
    """`pixel_values` `[images, 36, patch]` of a 6x6 grid, with its positions, shape and mask under given names.

    Frames of videos come likewise, with their number.
    """

    def pixels(rows: list[list[Picture]], generator: torch.Generator) -> dict[str, torch.Tensor]:
        grid = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), dim=-1).view(1, 36, 2)
        inputs: dict[str, torch.Tensor] = {}
        images = sum(picture.frames == 1 for picture in flat(rows))
        videos = [picture.frames for picture in flat(rows) if picture.frames > 1]
        if images:
            inputs["pixel_values"] = torch.randn(images, 36, patch, generator=generator)
            made = {
                "positions": grid.expand(images, -1, -1),
                "shape": torch.tensor([[6, 6]] * images),
                "mask": torch.ones(images, 36, dtype=torch.long),
            }
            inputs |= {name: made[what] for what, name in names.items()}
        if videos:
            inputs["pixel_values_videos"] = torch.randn(sum(videos), 36, patch, generator=generator)
            inputs["video_position_ids"] = grid.expand(sum(videos), -1, -1)
            inputs["num_frames_per_video"] = torch.tensor(videos)
        return inputs

    return pixels


def patch_strip(patch: int, side: int) -> Pixels:
    """`pixel_values` `[1, 3, patch, patch * patches of all images]`, with the grid of each image; frames likewise."""

    def pixels(rows: list[list[Picture]], generator: torch.Generator) -> dict[str, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = {}
        for suffix, is_video in (("", False), ("_videos", True)):
            count = sum(picture.frames for picture in flat(rows) if (picture.frames > 1) == is_video)
            if count:
                shape = (1, 3, patch, patch * side**2 * count)
                inputs[f"pixel_values{suffix}"] = torch.randn(*shape, generator=generator)
                inputs[f"target_sizes{suffix}"] = torch.tensor([[side, side]] * count)
        return inputs

    return pixels


def grids(*patch: int, merge: int = 2, sizes: bool = False, seconds: bool = False) -> Pixels:
    """Patches of all images in one tensor `[patches, *patch]`, with a grid for each image; videos likewise."""

    def pixels(rows: list[list[Picture]], generator: torch.Generator) -> dict[str, torch.Tensor]:
        inputs: dict[str, torch.Tensor] = {}
        for name, kind, is_video in (("pixel_values", "image", False), ("pixel_values_videos", "video", True)):
            pictures = [picture for picture in flat(rows) if (picture.frames > 1) == is_video]
            if pictures:
                shape = [[p.frames, p.height * merge, p.width * merge] for p in pictures]
                count = sum(p.tokens for p in pictures) * merge**2
                inputs[name] = torch.randn(count, *patch, generator=generator)
                inputs[f"{kind}_grid_thw"] = torch.tensor(shape)
                if seconds and is_video:
                    inputs["video_second_per_grid"] = torch.tensor([0.3] * len(pictures))
                if sizes:
                    inputs[f"{kind}_merge_sizes"] = torch.full((len(pictures),), merge)
        return inputs

    return pixels
