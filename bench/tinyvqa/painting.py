"""Scenes become pixels: textured cells with a digit or a shape in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from bench.tinyvqa.digits import DigitPool
from bench.tinyvqa.scenes import COLOURS, NUM_DIGITS, SHAPE_NAMES, TEXTURE_NAMES, Scene

CELL = 28
_STENCIL = 112


def render(scenes: Sequence[Scene], pool: DigitPool, rng: np.random.Generator, *, augment: bool = True) -> Tensor:
    """Paint scenes of one common layout: uint8 `[B * pages, 3, height * 28, width * 28]`.

    Every figure has a random size, shift and tilt and a slightly varying colour, every cell a texture with a random
    phase, strength and tint, every pixel some noise. `augment=False` leaves out the variation of the figures, which is
    tidier on a sample picture.
    """
    layout = scenes[0].layout
    if any(scene.layout != layout for scene in scenes):
        raise ValueError("scenes painted together must have one layout.")
    figures, colours, textures, instances = (
        torch.from_numpy(np.concatenate([getattr(scene, name) for scene in scenes]))
        for name in ("figures", "colours", "textures", "instances")
    )
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    paint = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[colours]
    if augment:
        paint = (paint + 8 * torch.randn(paint.shape, generator=generator)).clamp_(0, 255)
    under = _grounds(textures, generator)
    alpha = _masks(figures, instances, pool, generator, augment)
    cells = under + alpha * (paint[:, :, None, None] - under)
    cells += 3 * torch.randn((len(cells), 1, CELL, CELL), generator=generator)
    pages = cells.view(-1, layout.height, layout.width, 3, CELL, CELL).permute(0, 3, 1, 4, 2, 5)
    return pages.reshape(-1, 3, layout.height * CELL, layout.width * CELL).round_().clamp_(0, 255).to(torch.uint8)


def to_image(picture: Tensor) -> Image.Image:
    """Convert a painted page, uint8 `[3, H, W]`, to a PIL image."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def _masks(figures: Tensor, instances: Tensor, pool: DigitPool, generator: torch.Generator, augment: bool) -> Tensor:
    """Compute how much of each pixel a figure covers: float32 `[cells, 1, 28, 28]` in 0..1."""
    stencils = shape_stencils()[(figures - NUM_DIGITS).clamp_min(0)]
    is_digit = figures < NUM_DIGITS
    # Two steps, because sampling 8 x 8 pixels bilinearly at 28 x 28 leaves facets that no pen would draw.
    glyphs = pool.glyphs[instances[is_digit]][:, None]
    stencils[is_digit] = functional.interpolate(glyphs, size=(CELL, CELL), mode="bicubic", align_corners=False)
    count = len(figures)
    spread = 1.0 if augment else 0.0

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    size = 0.90 + spread * uniform(-0.12, 0.08)
    tilt = spread * uniform(-0.17, 0.17)
    across, down = spread * uniform(-0.10, 0.10), spread * uniform(-0.10, 0.10)
    cos, sin = tilt.cos() / size, tilt.sin() / size
    theta = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
    flow = functional.affine_grid(theta, [count, 1, CELL, CELL], align_corners=False)
    return functional.grid_sample(stencils, flow, align_corners=False).clamp_(0, 1)


def _grounds(textures: Tensor, generator: torch.Generator) -> Tensor:
    """Paint the textured background of each cell: float32 `[cells, 3, 28, 28]`, darker than every figure."""
    count = len(textures)
    phase = torch.rand((2, count, 1), generator=generator)
    steps = torch.arange(CELL) / CELL
    x, y = 4 * steps + phase[0], 4 * steps + phase[1]
    wave_x, wave_y = (2 * math.pi * x).sin()[:, None, :], (2 * math.pi * y).sin()[:, :, None]
    slopes = (2 * math.pi * (x[:, None, :] + y[:, :, None]) * 0.75).sin()
    plain = torch.zeros(count, CELL, CELL)
    patterns = {
        "plain": plain,
        "rows": wave_y.expand_as(plain),
        "columns": wave_x.expand_as(plain),
        "slopes": slopes,
        "checks": wave_x * wave_y * 1.3,
        "dots": (wave_x + wave_y - 0.8) * 0.9,
    }
    pattern = plain.clone()
    for index, name in enumerate(TEXTURE_NAMES):
        chosen = textures == index
        pattern[chosen] = patterns[name][chosen]
    base = 40 + 12 * torch.rand((count, 1), generator=generator) + 8 * torch.randn((count, 3), generator=generator)
    strength = 12 + 12 * torch.rand((count, 1), generator=generator)
    tint = strength * (1 + 0.3 * torch.randn((count, 3), generator=generator))
    return base[:, :, None, None] + tint[:, :, None, None] * pattern.clamp(-1, 1)[:, None]


@lru_cache(maxsize=1)
def _stencils() -> Tensor:
    drawn = []
    for name in SHAPE_NAMES:
        image = Image.new("L", (_STENCIL, _STENCIL))
        _draw(ImageDraw.Draw(image), name)
        small = image.resize((CELL, CELL), Image.Resampling.BOX)
        drawn.append(torch.from_numpy(np.asarray(small, dtype=np.float32) / 255))
    return torch.stack(drawn)[:, None]


def shape_stencils() -> Tensor:
    """Return the shapes as coverage masks: float32 `[shapes, 1, 28, 28]`, in the order of `SHAPE_NAMES`."""
    return _stencils().clone()


def _draw(pen: ImageDraw.ImageDraw, name: str) -> None:
    def scaled(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * _STENCIL, y * _STENCIL) for x, y in points]

    if name == "circle":
        pen.ellipse(scaled([(0.14, 0.14), (0.86, 0.86)]), fill=255)
    elif name == "square":
        pen.rectangle(scaled([(0.18, 0.18), (0.82, 0.82)]), fill=255)
    elif name == "triangle":
        pen.polygon(scaled([(0.5, 0.12), (0.9, 0.86), (0.1, 0.86)]), fill=255)
    elif name == "star":
        turns = [(0.46 if i % 2 == 0 else 0.19, math.pi * (i / 5 - 0.5)) for i in range(10)]
        pen.polygon(scaled([(0.5 + r * math.cos(a), 0.52 + r * math.sin(a)) for r, a in turns]), fill=255)
    elif name == "heart":
        pen.ellipse(scaled([(0.1, 0.14), (0.53, 0.57)]), fill=255)
        pen.ellipse(scaled([(0.47, 0.14), (0.9, 0.57)]), fill=255)
        pen.polygon(scaled([(0.13, 0.45), (0.87, 0.45), (0.5, 0.9)]), fill=255)
    elif name == "cross":
        pen.line(scaled([(0.2, 0.2), (0.8, 0.8)]), fill=255, width=_STENCIL // 6)
        pen.line(scaled([(0.2, 0.8), (0.8, 0.2)]), fill=255, width=_STENCIL // 6)
    elif name == "ring":
        pen.ellipse(scaled([(0.12, 0.12), (0.88, 0.88)]), outline=255, width=_STENCIL // 8)
    elif name == "bar":
        pen.rectangle(scaled([(0.08, 0.38), (0.92, 0.62)]), fill=255)
    else:
        raise ValueError(f"shape: expected one of {SHAPE_NAMES}, got {name!r}.")
