"""Draws a pruned prompt: dropped tokens dimmed, kept ones outlined, scores as heat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hawk_kernels.pictures.regions import Regions
from hawk_kernels.pictures.sheets import Sheet
from hawk_kernels.viz import (
    _FAINT,
    _INK,
    _KEPT_EDGE,
    _PAGE,
    _draw_legend,
    _fitting_font,
    _outline_kept,
    dim_dropped,
    fit,
    heat_colour,
)

if TYPE_CHECKING:
    from PIL import Image

_BLANK = (214, 217, 222)
_HEAT_STRENGTH = 0.72
_FRAMES_IN_A_LINE = 6


@dataclass(frozen=True)
class RowValues:
    """What happened to the tokens of a row.

    Attributes:
        kept: bool `[T]`.
        scores: float32 `[T]`, not finite where nothing was scored.
    """

    kept: np.ndarray
    scores: np.ndarray

    def kept_on(self, sheet: Sheet) -> np.ndarray:
        """Return bool `[rows, columns]`, the cells whose tokens stayed."""
        kept: np.ndarray = self.kept[sheet.tokens] & (sheet.tokens >= 0)
        return kept

    def heat_on(self, sheet: Sheet) -> np.ndarray:
        """Return float64 `[rows, columns]`, scores from 0 (the lowest of the row) to 1; NaN where there is none.

        All sheets of a row share one scale, since their tokens competed.
        """
        finite = np.isfinite(self.scores)
        if not finite.any():
            return np.full(sheet.tokens.shape, np.nan)
        values = np.where(finite, self.scores, np.nan).astype(np.float64)
        low, high = np.nanmin(values), np.nanmax(values)
        scaled = (values - low) / max(float(high - low), 1e-12)
        heat: np.ndarray = np.where(sheet.tokens >= 0, scaled[sheet.tokens], np.nan)
        return heat


def sheet_picture(frame: Image.Image | None, sheet: Sheet, smallest: int, largest: int) -> Image.Image:
    """Cut out the part of a picture under a sheet, in RGB, its long side scaled into `smallest .. largest` pixels.

    Args:
        frame: the picture, or None for a blank one.
        sheet: says which part; what a processor pads is grey.
        smallest: least pixels of the long side, though never less than three for a token.
        largest: most pixels of the long side.
    """
    from PIL import Image

    rows, columns = sheet.tokens.shape
    if frame is None or sheet.box is None:
        side = max(4, smallest // max(rows, columns))
        return Image.new("RGB", (columns * side, rows * side), _BLANK)
    width, height = frame.size
    left, right = (round(x * width) for x in (sheet.box[0], sheet.box[2]))
    top, bottom = (round(y * height) for y in (sheet.box[1], sheet.box[3]))
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    part = frame
    if (left, top, right, bottom) != (0, 0, width, height):
        part = Image.new("RGB", (right - left, bottom - top), _BLANK)
        inner = frame.crop((max(left, 0), max(top, 0), min(right, width), min(bottom, height)))
        part.paste(inner, (max(-left, 0), max(-top, 0)))
    least = 3 * max(rows, columns)
    return fit(part, max(smallest, least), max(largest, least))


def _cells_of(size: tuple[int, int], grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Find the cell row of each line of pixels and the cell column of each column, as `viz.cell_boxes` divides them."""

    def cells(length: int, count: int) -> np.ndarray:
        edges = [round(number * length / count) for number in range(1, count)]
        return np.searchsorted(np.array(edges, dtype=np.int64), np.arange(length), side="right")

    return cells(size[1], grid[0]), cells(size[0], grid[1])


def heat_panel(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """Draw the picture in grey under its tokens' heat; cells without a score stay grey.

    Args:
        picture: in RGB.
        heat: float64 `[rows, columns]`, in 0..1 or NaN.
    """
    from PIL import Image

    height, width = heat.shape
    rows, columns = _cells_of(picture.size, (height, width))
    palette = np.array([heat_colour(level / 255) for level in range(256)], dtype=np.float64)
    scored = np.isfinite(heat)
    colours = palette[np.where(scored, np.round(np.nan_to_num(heat) * 255), 0).astype(int)]
    strength = np.where(scored, _HEAT_STRENGTH, 0.0)
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[:, :, None]
    part = strength[rows][:, columns][:, :, None]
    return Image.fromarray(np.round(grey * (1 - part) + colours[rows][:, columns] * part).astype(np.uint8))


def kept_panel(picture: Image.Image, sheet: Sheet, kept: np.ndarray) -> Image.Image:
    """Draw the picture with the cells of dropped tokens dimmed, and those of kept ones outlined.

    Args:
        picture: in RGB.
        sheet: the grid over it; cells without a token become blank.
        kept: bool `[rows, columns]`.
    """
    from PIL import Image

    grid = (kept.shape[0], kept.shape[1])
    panel = dim_dropped(picture, kept, grid)
    if (sheet.tokens < 0).any():
        rows, columns = _cells_of(picture.size, grid)
        blank = (sheet.tokens < 0)[rows][:, columns][:, :, None]
        panel = Image.fromarray(np.where(blank, np.array(_PAGE, dtype=np.uint8), np.asarray(panel)))
    _outline_kept(panel, kept.astype(int), grid, [_KEPT_EDGE])
    return panel


def draw_row(regions: Sequence[Regions], values: RowValues, *, title: str | None = None) -> Image.Image:
    """Draw one page for a row: each image as it is, with scores as heat, and with the dropped tokens dimmed.

    Args:
        regions: its images and videos.
        values: what happened to its tokens.
        title: a line above, say the question.
    """
    page = _Page(unit=18)
    if title:
        page.text(title, 1.4, _INK)
    for image in regions:
        summary = _summary(image, values)
        if len(regions) > 1:
            summary = f"{image.name}: {summary}"
        page.text(summary, 1.15, _INK)
        if image.note:
            page.text(image.note, 1.0, _FAINT)
            page.text("Its tokens are drawn in their order, line by line, beside the picture.", 1.0, _FAINT)
        _draw_image(page, image, values)
    return page.drawn(with_heat=bool(np.isfinite(values.scores).any()))


def _summary(image: Regions, values: RowValues) -> str:
    text = f"kept {int(values.kept[image.positions].sum())} of {len(image.positions)} visual tokens"
    others = image.others()
    if len(others):
        text += f", {int(values.kept[others].sum())} of {len(others)} that stand for no part of the picture among them"
    return text


def _draw_image(page: _Page, image: Regions, values: RowValues) -> None:
    """Draw the panels of an image side by side, or below each other if it is wide; draw a video line by line."""
    is_strip = len({sheet.frame for sheet in image.sheets}) > 1
    for start in range(0, len(image.sheets), _FRAMES_IN_A_LINE if is_strip else 1):
        sheets = image.sheets[start : start + (_FRAMES_IN_A_LINE if is_strip else 1)]
        smallest, largest = (200, 280) if is_strip else (512, 1024)
        lines: list[list[tuple[str, Image.Image]]] = [[], [], []]
        for sheet in sheets:
            frame = image.frame_of(sheet)
            picture = sheet_picture(frame, sheet, smallest, largest)
            kept, heat = values.kept_on(sheet), values.heat_on(sheet)
            if sheet.box is None and frame is not None:
                lines[0].append((image.name, fit(frame, smallest, largest)))
            else:
                lines[0].append((sheet.name, picture))
            if np.isfinite(heat).any():
                lines[1].append(("scores", heat_panel(picture, heat)))
            count = int((sheet.tokens >= 0).sum())
            lines[2].append((f"kept {int(kept.sum())} of {count}", kept_panel(picture, sheet, kept)))
        panels = [line for line in lines if line]
        is_wide = all(panel.width > 2 * panel.height for line in panels for _, panel in line)
        if is_strip or is_wide:
            for line in panels:
                page.band(line)
        else:
            page.band([panel for line in panels for panel in line])


class _Page:
    """Lines of text and bands of panels, one below the other.

    Args:
        unit: pixels of a caption's height.
    """

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._blocks: list[tuple[str, float, tuple[int, int, int]] | list[tuple[str, Image.Image]]] = []

    def text(self, line: str, height: float, ink: tuple[int, int, int]) -> None:
        """Add a line, `height` units high."""
        self._blocks.append((line, height, ink))

    def band(self, panels: list[tuple[str, Image.Image]]) -> None:
        """Add panels side by side, each above its caption."""
        self._blocks.append(panels)

    def drawn(self, with_heat: bool) -> Image.Image:
        """Draw the page, with the legend below."""
        from PIL import Image, ImageDraw

        unit = self._unit
        widths = [sum(p.width + unit for _, p in block) for block in self._blocks if isinstance(block, list)]
        width = max(30 * unit, max(widths) + unit)
        heights = [
            max(panel.height for _, panel in block) + 2 * unit
            if isinstance(block, list)
            else round(1.5 * block[1] * unit)
            for block in self._blocks
        ]
        page = Image.new("RGB", (width, sum(heights) + 3 * unit), _PAGE)
        draw = ImageDraw.Draw(page)
        y = unit // 2
        for block, height in zip(self._blocks, heights, strict=True):
            if isinstance(block, list):
                x = unit
                for caption, panel in block:
                    page.paste(panel, (x, y))
                    font = _fitting_font(draw, caption, unit, panel.width)
                    draw.text((x, y + panel.height + unit * 0.3), caption, fill=_INK, font=font)
                    x += panel.width + unit
            else:
                line, size, ink = block
                font = _fitting_font(draw, line, round(size * unit), width - 2 * unit)
                draw.text((unit, y), line, fill=ink, font=font)
            y += height
        _draw_legend(draw, (unit, y + unit // 2), unit, {"kept": _KEPT_EDGE}, with_heat=with_heat)
        return page
