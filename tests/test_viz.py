"""The overlay: which pixels belong to which token, and what happens to them."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

from hawk_kernels.viz import (  # noqa: E402
    ROLE_EDGES,
    cell_boxes,
    dim_dropped,
    draw_heat,
    draw_overlay,
    fit,
    heat_colour,
)


def striped(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(224, 224), (225, 113), (9, 7), (640, 480)])
@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (7, 9)])
def test_cells_tile_the_picture_exactly_once(size, grid):
    cover = np.zeros((size[1], size[0]), dtype=int)
    boxes = list(cell_boxes(size, grid))
    for left, top, right, bottom in boxes:
        cover[top:bottom, left:right] += 1
    assert len(boxes) == grid[0] * grid[1]
    assert (cover == 1).all()


def test_kept_cells_are_untouched_and_dropped_cells_lose_contrast():
    image, grid = striped(100, 60), (3, 5)
    keep = torch.zeros(15, dtype=torch.bool)
    keep[[0, 7, 14]] = True
    before, after = np.asarray(image).astype(int), np.asarray(dim_dropped(image, keep, grid)).astype(int)
    for kept, (left, top, right, bottom) in zip(keep.tolist(), cell_boxes(image.size, grid), strict=True):
        old, new = before[top:bottom, left:right], after[top:bottom, left:right]
        if kept:
            assert (old == new).all()
        else:
            assert new.std() < 0.3 * old.std()


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (250, 40, 40)])
def test_dropped_cells_can_be_told_from_kept_ones_on_any_background(colour):
    out = np.asarray(dim_dropped(Image.new("RGB", (40, 20), colour), [True, False], (1, 2))).astype(int)
    assert np.abs(out[10, 10] - out[10, 30]).max() > 60


def test_a_mask_of_a_square_grid_may_be_two_dimensional():
    image = striped(30, 20)
    flat = [True, False, False, True, True, False]
    assert (
        dim_dropped(image, flat, (2, 3)).tobytes()
        == dim_dropped(image, torch.tensor(flat).view(2, 3), (2, 3)).tobytes()
    )


def test_heat_orders_cells_by_score_and_leaves_unscored_cells_grey():
    image = Image.new("RGB", (40, 10), (128, 128, 128))
    out = np.asarray(draw_heat(image, torch.tensor([-1.0, 0.5, 3.0, -torch.inf]), (1, 4))).astype(int)
    brightness = [out[5, x].sum() for x in (5, 15, 25)]
    assert brightness == sorted(brightness)
    assert len(set(brightness)) == 3
    assert (out[5, 35] == 128).all()


def test_heat_of_equal_or_missing_scores_is_drawn_without_complaint():
    image = striped(20, 20)
    draw_heat(image, torch.zeros(4), (2, 2))
    assert draw_heat(image, torch.full((4,), -torch.inf), (2, 2)).size == (20, 20)


def test_heat_colours_grow_brighter_all_the_way():
    weights = np.array([0.299, 0.587, 0.114])
    brightness = [float(np.dot(heat_colour(v), weights)) for v in np.linspace(0, 1, 50)]
    assert brightness == sorted(brightness)
    assert heat_colour(-3) == heat_colour(0)
    assert heat_colour(7) == heat_colour(1)


@pytest.mark.parametrize(
    ("size", "longest"), [((56, 56), 560), ((224, 112), 672), ((700, 300), 700), ((4000, 1000), 1024)]
)
def test_small_pictures_grow_by_a_whole_factor_and_large_ones_shrink(size, longest):
    out = fit(Image.new("L", size))
    assert max(out.size) == longest
    assert out.mode == "RGB"
    assert abs(out.width / out.height - size[0] / size[1]) < 0.01


@pytest.mark.parametrize(
    ("size", "grid"), [((224, 224), (8, 8)), ((252, 168), (6, 9)), ((1000, 300), (4, 13)), ((28, 28), (1, 1))]
)
def test_overlay_is_large_enough_for_a_person(size, grid):
    count = grid[0] * grid[1]
    out = draw_overlay(
        striped(*size), torch.arange(count) % 3 == 0, torch.randn(count), grid, title="Which digit is red?"
    )
    assert out.mode == "RGB"
    assert min(out.size) >= 150
    assert max(out.size) >= 512


def test_overlay_shows_the_kept_cell_as_in_the_picture_and_without_scores_has_one_panel_less():
    image, keep = striped(512, 512), torch.tensor([True, False, False, False])
    two = draw_overlay(image, keep, None, (2, 2))
    three = draw_overlay(image, keep, torch.randn(4), (2, 2))
    assert three.width > two.width
    gap = two.width - 2 * 512
    left, top = 512 + 2 * (gap // 3), gap // 3
    kept = np.asarray(two)[top + 100 : top + 200, left + 100 : left + 200]
    assert (kept == np.asarray(image)[100:200, 100:200]).all()


def test_roles_are_outlined_in_three_colours():
    """A line between neighbours of different roles, none between equal ones; two lone buffers take more than a pair."""
    image = Image.new("RGB", (512, 512), (20, 90, 60))
    roles = [1, 2, 0, 0] + [2, 0, 0, 0] + [0, 0, 3, 3] + [0, 0, 0, 0]
    keep = [role > 0 for role in roles]
    page = draw_overlay(image, keep, None, (4, 4), roles=roles)
    pixels = {colour: count for count, colour in page.getcolors(1 << 24)}
    anchor, buffers, registers = (pixels[edge] for edge in ROLE_EDGES.values())
    assert 1000 < anchor < registers < buffers
    alike = draw_overlay(image, keep, None, (4, 4))
    assert alike.size == page.size
    assert not {colour for _, colour in alike.getcolors(1 << 24)} & {ROLE_EDGES["anchor"], ROLE_EDGES["register"]}
    with pytest.raises(ValueError, match="roles must have one value for each of 4 x 4 cells"):
        draw_overlay(image, keep, None, (4, 4), roles=roles[:5])


@pytest.mark.parametrize("draw", [dim_dropped, draw_heat])
def test_a_wrong_number_of_cells_is_named(draw):
    with pytest.raises(ValueError, match=r"one value for each of 2 x 3 cells, \[6\] or \[2, 3\], got \[5\]"):
        draw(striped(30, 20), torch.zeros(5), (2, 3))
