"""Pictures of what pruning kept: the image, the score of each visual token as heat, and the tokens that stayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    TokenValues = torch.Tensor | np.ndarray | Sequence[Any]

_PAGE = (255, 255, 255)
_INK = (38, 42, 51)
_FAINT = (120, 126, 138)
# A veil of middle brightness shows on dark pictures as well as on bright ones, where black or white would vanish.
_VEIL = (104, 109, 120)
_VEIL_STRENGTH = 0.80
_KEPT_EDGE = (255, 176, 32)
# Told apart also by those who see no red or no green.
ROLE_EDGES = {"anchor": (213, 33, 75), "buffer": (255, 176, 32), "register": (40, 132, 228)}
# Dark violet over red to pale yellow: brightness rises all the way, so the scale survives a black-and-white print.
_HEAT = ((13, 8, 60), (84, 15, 110), (160, 44, 96), (219, 80, 59), (247, 144, 30), (250, 210, 90), (252, 253, 200))


def cell_boxes(size: tuple[int, int], grid: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Return the pixel boxes `(left, top, right, bottom)` of the cells of `grid = (rows, columns)`, row by row.

    The boxes cover the picture without gap or overlap, also where `size = (width, height)` is no multiple of the grid.
    """
    width, height = size
    rows, columns = grid
    for row in range(rows):
        for column in range(columns):
            yield (
                round(column * width / columns),
                round(row * height / rows),
                round((column + 1) * width / columns),
                round((row + 1) * height / rows),
            )


def fit(image: Image.Image, smallest: int = 512, largest: int = 1024) -> Image.Image:
    """Scale the image, in RGB, so that its long side lies in `smallest .. largest`; it grows by a whole factor."""
    from PIL import Image

    image = image.convert("RGB")
    longest = max(image.size)
    if longest < smallest:
        factor = -(-smallest // longest)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    if longest > largest:
        size = (max(1, round(image.width * largest / longest)), max(1, round(image.height * largest / longest)))
        return image.resize(size, Image.Resampling.LANCZOS)
    return image


def dim_dropped(image: Image.Image, keep_mask: TokenValues, grid: tuple[int, int]) -> Image.Image:
    """Copy the image with a veil over the cells of dropped tokens; those of kept tokens stay as they are.

    Args:
        image: any mode; the result is RGB of the same size.
        keep_mask: bool, `[rows * columns]` or `[rows, columns]`, True for a token that stayed.
        grid: `(rows, columns)` of visual tokens.

    Raises:
        ValueError: the mask does not have one value for each cell.
    """
    from PIL import Image

    keep = _per_cell(keep_mask, grid, "keep_mask").astype(bool)
    image = image.convert("RGB")
    grey = image.convert("L").convert("RGB")
    veiled = Image.blend(grey, Image.new("RGB", image.size, _VEIL), _VEIL_STRENGTH)
    out = image.copy()
    for kept, box in zip(keep.flat, cell_boxes(image.size, grid), strict=True):
        if not kept:
            out.paste(veiled.crop(box), box)
    return out


def draw_heat(image: Image.Image, scores: TokenValues, grid: tuple[int, int]) -> Image.Image:
    """Draw the image in grey under its scores as heat, from the lowest (dark violet) to the highest (pale yellow).

    Args:
        image: any mode; the result is RGB of the same size.
        scores: `[rows * columns]` or `[rows, columns]`; cells whose score is not finite stay grey.
        grid: `(rows, columns)` of visual tokens.

    Raises:
        ValueError: the scores do not have one value for each cell.
    """
    import numpy as np
    from PIL import Image

    values = _per_cell(scores, grid, "scores").astype(np.float64).ravel()
    finite = np.isfinite(values)
    out = image.convert("L").convert("RGB")
    if not finite.any():
        return out
    low, high = values[finite].min(), values[finite].max()
    span = max(float(high - low), 1e-12)
    for value, scored, box in zip(values, finite, cell_boxes(image.size, grid), strict=True):
        if scored:
            patch = out.crop(box)
            out.paste(Image.blend(patch, Image.new("RGB", patch.size, heat_colour((value - low) / span)), 0.72), box)
    return out


def heat_colour(value: float) -> tuple[int, int, int]:
    """Return the colour of a value in 0..1 on the heat scale."""
    position = min(max(float(value), 0.0), 1.0) * (len(_HEAT) - 1)
    index = min(int(position), len(_HEAT) - 2)
    part = position - index
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_HEAT[index], _HEAT[index + 1], strict=True))
    return red, green, blue


def draw_overlay(
    image: Image.Image,
    keep_mask: TokenValues,
    scores: TokenValues | None,
    grid: tuple[int, int],
    *,
    roles: TokenValues | None = None,
    title: str | None = None,
    subtitle: str | None = None,
) -> Image.Image:
    """Draw one picture of a pruned prompt: the image, the scores as heat, and the image with dropped tokens dimmed.

    Small images are enlarged until a person sees something, and large ones reduced. Panels stand side by side, or
    one below the other when the image is much wider than high.

    Args:
        image: the image the model saw, any size and mode.
        keep_mask: bool, `[rows * columns]` or `[rows, columns]`, True for a visual token that stayed.
        scores: importance of each visual token in the same order, non-finite where there was none; `None` leaves the
            heat panel out.
        grid: `(rows, columns)` of visual tokens, after the model's merging of patches.
        roles: why a token stayed, for HiPrune: 1 for an anchor, 2 for a buffer, 3 for a register, each outlined in a
            colour of its own; `None` outlines all alike.
        title: a line above the panels, say the question.
        subtitle: a fainter line below it, say the answers.

    Raises:
        ValueError: mask, scores or roles do not have one value for each cell.
    """
    from PIL import Image, ImageDraw

    keep = _per_cell(keep_mask, grid, "keep_mask").astype(bool)
    picture = fit(image)
    panels = [("image", picture)]
    if scores is not None:
        panels.append(("score of each visual token", draw_heat(picture, scores, grid)))
    kept = dim_dropped(picture, keep, grid)
    edges = {"kept": _KEPT_EDGE} if roles is None else ROLE_EDGES
    _outline_kept(kept, keep if roles is None else _per_cell(roles, grid, "roles"), grid, list(edges.values()))
    panels.append((f"kept {int(keep.sum())} of {keep.size} visual tokens", kept))

    unit = max(14, max(picture.size) // 28)
    gap, caption = unit, 2 * unit
    stacked = picture.width > 2 * picture.height
    lines = ((title, round(1.5 * unit), _INK), (subtitle, round(1.15 * unit), _FAINT))
    headings = [(text, height, ink) for text, height, ink in lines if text]
    top = gap + sum(round(1.5 * height) for _, height, _ in headings)
    legend = 2 * unit
    count = len(panels)
    if stacked:
        size = (picture.width + 2 * gap, top + count * (picture.height + caption) + legend)
    else:
        size = (count * picture.width + (count + 1) * gap, top + picture.height + caption + legend)
    page = Image.new("RGB", size, _PAGE)
    draw = ImageDraw.Draw(page)
    y = gap // 2
    for text, height, ink in headings:
        draw.text((gap, y), text, fill=ink, font=_fitting_font(draw, text, height, size[0] - 2 * gap))
        y += round(1.5 * height)
    for number, (text, panel) in enumerate(panels):
        left = gap if stacked else gap + number * (picture.width + gap)
        upper = top + (number * (picture.height + caption) if stacked else 0)
        page.paste(panel, (left, upper))
        font = _fitting_font(draw, text, unit, picture.width)
        draw.text((left, upper + picture.height + unit * 0.35), text, fill=_INK, font=font)
    _draw_legend(draw, (gap, size[1] - round(1.55 * unit)), unit, edges, with_heat=scores is not None)
    return page


def _per_cell(values: Any, grid: tuple[int, int], name: str) -> np.ndarray:
    import numpy as np

    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    array = np.asarray(values)
    rows, columns = grid
    if array.shape not in ((rows * columns,), (rows, columns)):
        raise ValueError(
            f"{name} must have one value for each of {rows} x {columns} cells, [{rows * columns}] or "
            f"[{rows}, {columns}], got {list(array.shape)}. Select the visual tokens of one image first."
        )
    return array.reshape(rows, columns)


def _outline_kept(
    picture: Image.Image, roles: np.ndarray, grid: tuple[int, int], edges: Sequence[tuple[int, int, int]]
) -> None:
    """Draw a line where a kept cell (role 1, 2, ...) meets one of another role, a dropped one (0) or the border."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(picture)
    rows, columns = grid
    cell = min(picture.width / columns, picture.height / rows)
    width = max(1, round(cell / 20))

    def is_alike(row: int, column: int, role: int) -> bool:
        return 0 <= row < rows and 0 <= column < columns and int(roles[row, column]) == role

    for number, (left, top, right, bottom) in enumerate(cell_boxes(picture.size, grid)):
        row, column = divmod(number, columns)
        role = int(roles[row, column])
        if role == 0:
            continue
        # An edge has a bar along it; a corner, where both edges are open inwards, at most a square.
        for down, bar_top, bar_bottom in (
            (-1, top, top + width - 1),
            (0, top, bottom - 1),
            (1, bottom - width, bottom - 1),
        ):
            for along, bar_left, bar_right in (
                (-1, left, left + width - 1),
                (0, left, right - 1),
                (1, right - width, right - 1),
            ):
                if (down or along) and not is_alike(row + down, column + along, role):
                    draw.rectangle((bar_left, bar_top, bar_right, bar_bottom), fill=edges[role - 1])


def _draw_legend(
    draw: Any, corner: tuple[int, int], unit: int, edges: dict[str, tuple[int, int, int]], with_heat: bool
) -> None:
    x, y = corner
    font = _font(round(0.9 * unit))
    if with_heat:
        draw.text((x, y), "low", fill=_FAINT, font=font)
        x += round(draw.textlength("low ", font=font))
        length = 8 * unit
        for offset in range(length):
            draw.line((x + offset, y + unit * 0.1, x + offset, y + unit), fill=heat_colour(offset / (length - 1)))
        x += length + unit // 3
        draw.text((x, y), "high score", fill=_FAINT, font=font)
        x += round(draw.textlength("high score", font=font)) + 2 * unit
    for fill, edge, text in (*((None, edge, name) for name, edge in edges.items()), (_VEIL, _VEIL, "dropped")):
        draw.rectangle((x, y + unit * 0.1, x + unit, y + unit), fill=fill, outline=edge, width=max(2, unit // 8))
        x += round(1.35 * unit)
        draw.text((x, y), text, fill=_FAINT, font=font)
        x += round(draw.textlength(text, font=font)) + 2 * unit


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _fitting_font(draw: Any, text: str, size: int, width: int) -> Any:
    """Return the default font, smaller than `size` if the text would not fit in `width` pixels."""
    font = _font(size)
    length = draw.textlength(text, font=font)
    return font if length <= width else _font(max(8, int(size * width / length)))
