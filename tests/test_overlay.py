"""`pruning.overlay`: what is dimmed, what is hot, for every family and method, and what is refused."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from hawk_kernels import prune
from hawk_kernels.methods import METHODS
from hawk_kernels.pictures.overlay import RowValues, heat_panel, kept_panel, sheet_picture
from hawk_kernels.pictures.sheets import WHOLE, Sheet
from tests.host_reads import HostReads
from tests.tiny_families import BY_NAME, TINY, batch, tiny_model
from tests.tiny_models import Picture, question, qwen_batch, qwen_vl, words

# what the tiny inputs say of their pictures
SIZES = {"llava_next": (32, 16), "llava_next_video": (32, 16), "llava_onevision": (32, 16)}
ORDER_ONLY = {"aria", "idefics2"}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def picture_for(name: str, picture: Picture) -> Image.Image:
    if name in SIZES:
        return noise(*SIZES[name])
    return noise(30, 30) if BY_NAME[name].picture else noise(picture.width * 10, picture.height * 10)


def pruned(model, inputs, keep_ratio=0.5, method="random", **options):
    with prune(model, keep_ratio, method=method, **options) as pruning, torch.no_grad():
        model(**inputs)
    return pruning


@pytest.mark.parametrize("name", [family.model_type for family in TINY])
def test_every_family_shows_every_visual_token_of_its_images_once(name):
    model, picture = tiny_model(name), BY_NAME[name].picture or Picture(3, 4)
    inputs = batch(name, question([picture, picture]), question(picture))
    pruning = pruned(model, inputs)
    shown = picture_for(name, picture)
    for row, count in ((0, 2), (1, 1)):
        regions = pruning._pruned_prompt.regions([shown] * count, row, None)
        assert len(regions) == count
        tokens = np.concatenate([t for r in regions for t in (*(s.tokens.ravel() for s in r.sheets), r.others())])
        placeholders = np.flatnonzero(pruning._pruned_prompt.prompt.all_placeholders()[row])
        assert sorted(tokens[tokens >= 0].tolist()) == placeholders.tolist()
        assert all((region.note is not None) == (name in ORDER_ONLY) for region in regions)
        page = pruning.overlay([shown] * count, row=row)
        assert page.mode == "RGB"
        assert page.width > 500


# the frames of MiniCPM are told apart by text that these prompts lack; test_regions.py has them
@pytest.mark.parametrize("name", [f.model_type for f in TINY if f.video and not f.model_type.startswith("minicpm")])
def test_videos_are_strips_of_their_frames(name):
    family = BY_NAME[name]
    picture = Picture(1, 9, 4) if family.picture else Picture(3, 4, 4)
    pruning = pruned(tiny_model(name), batch(name, question(picture)))
    frames = [noise(30, 30, seed) if family.picture else noise(40, 30, seed) for seed in range(8)]
    (video,) = pruning._pruned_prompt.regions(frames, 0, None)
    assert video.name == "video 1"
    assert video.note is None
    shown = [frames.index(video.frame_of(sheet)) if video.frame_of(sheet) in frames else None for sheet in video.sheets]
    # four frames (two in families that merge in time) of eight
    assert len(video.sheets) in (2, 4)
    assert shown == sorted(shown)
    assert shown[0] == 0
    assert shown[-1] >= 6
    assert video.positions.tolist() == np.flatnonzero(pruning._pruned_prompt.prompt.all_placeholders()[0]).tolist()
    page = pruning.overlay(np.stack([np.asarray(frame) for frame in frames]))
    assert page.width > 400


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_is_drawn(method):
    model = qwen_vl()
    options = {"head_weights": "uniform"} if METHODS[method].uses_head_weights else {}
    pruning = pruned(model, qwen_batch(question(Picture(4, 6))), 0.25, method, **options)
    values = pruning._pruned_prompt.values(0)
    (region,) = pruning._pruned_prompt.regions(noise(60, 40), 0, None)
    (sheet,) = region.sheets
    assert values.kept_on(sheet).sum() == 6
    assert pruning.overlay(noise(60, 40)).width > 1000


def test_dropped_cells_are_dimmed_and_kept_ones_stay_as_they_are():
    picture, sheet = noise(90, 60), Sheet("picture", np.arange(6).reshape(2, 3))
    kept = np.array([[True, False, False], [False, False, True]])
    panel = np.asarray(kept_panel(picture, sheet, kept)).astype(int)
    before = np.asarray(picture).astype(int)
    assert (panel[5:25, 5:25] == before[5:25, 5:25]).all()
    assert panel[5:25, 35:55].std() < 0.3 * before[5:25, 35:55].std()
    assert (panel[0, 5] == (255, 176, 32)).all()


def test_heat_rises_with_the_score_and_shares_one_scale_over_all_sheets():
    values = RowValues(np.ones(6, bool), np.array([0.0, 1, 2, 3, 4, 8], dtype=np.float32))
    low, high = Sheet("a", np.array([[0, 1, 2]])), Sheet("b", np.array([[3, 4, 5]]))
    assert values.heat_on(low).tolist() == [[0.0, 0.125, 0.25]]
    assert values.heat_on(high).max() == 1.0
    picture = Image.new("RGB", (30, 10), (128, 128, 128))
    bright = [np.asarray(heat_panel(picture, values.heat_on(s)).convert("L"))[5, [5, 15, 25]] for s in (low, high)]
    assert (np.diff(np.concatenate(bright).astype(int)) > 0).all()


@pytest.mark.parametrize("scores", [[-np.inf] * 3, [np.nan, np.inf, -np.inf]])
def test_a_row_without_finite_scores_has_no_heat(scores):
    values = RowValues(np.ones(3, bool), np.array(scores, dtype=np.float32))
    assert np.isnan(values.heat_on(Sheet("picture", np.array([[0, 1, 2]])))).all()


def test_cells_without_a_token_are_neither_kept_nor_hot():
    values = RowValues(np.array([True, True]), np.array([1.0, 2.0], dtype=np.float32))
    sheet = Sheet("tokens", np.array([[0, -1], [1, -1]]), None)
    assert values.kept_on(sheet).tolist() == [[True, False], [True, False]]
    assert np.isnan(values.heat_on(sheet)[:, 1]).all()


def test_a_sheet_beyond_the_picture_is_padded_in_grey_and_one_inside_is_cut_out():
    red = Image.new("RGB", (100, 50), (255, 0, 0))
    tokens = np.zeros((2, 2), dtype=np.int64)
    padded = np.asarray(sheet_picture(red, Sheet("a", tokens, (0.0, -0.5, 1.0, 1.5)), 100, 200))
    assert padded.shape[0] == padded.shape[1]
    assert (padded[5, 50] == padded[-5, 50]).all()
    assert padded[50, 50, 0] > 250
    assert padded[5, 50, 1] > 100
    cut = sheet_picture(red, Sheet("b", tokens, (0.25, 0.0, 0.75, 1.0)), 100, 200)
    assert cut.width == cut.height
    assert np.asarray(cut)[..., 1].max() == 0


def test_generate_and_forward_and_beams_are_drawn_alike():
    model = qwen_vl()
    inputs = qwen_batch(question(Picture(4, 6)), question([Picture(2, 3), Picture(3, 2)]))
    shown = noise(60, 40)
    by_forward = pruned(model, inputs, method="divprune")
    with prune(model, 0.5, method="divprune") as by_generate:
        model.generate(**inputs, max_new_tokens=2, num_beams=2, do_sample=False)
    assert by_generate.keep_mask.shape[0] == 4
    page = np.asarray(by_forward.overlay(shown))
    for row in (0, 1):
        assert (np.asarray(by_generate.overlay(shown, row=row)) == page).all()
    two = [noise(30, 20), noise(20, 30)]
    assert (np.asarray(by_generate.overlay(two, row=3)) == np.asarray(by_forward.overlay(two, row=1))).all()


def test_overlay_shows_the_last_prefill_of_the_calling_thread():
    model = qwen_vl()
    with prune(model, 0.5, method="random") as pruning, torch.no_grad():
        model(**qwen_batch(question(Picture(4, 6))))

        def other():
            with torch.no_grad():
                model(**qwen_batch(question(Picture(6, 2))))
            pages.append(pruning.overlay(noise(20, 60)))

        pages: list[Image.Image] = []
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(pages) == 1
    assert pruning.overlay(noise(60, 40)).width > 1000


def test_noting_what_an_overlay_needs_reads_nothing_from_the_device():
    model = qwen_vl()
    inputs = qwen_batch(question(Picture(4, 6)))
    with prune(model, 0.5, method="random") as pruning, torch.no_grad(), HostReads() as reads:
        model(**inputs)
    assert not [place for place in reads.places if place.startswith(("encoded", "regions", "pruned", "overlay"))]
    encoded = pruning._pruned_prompt.encoded["image"].arguments
    assert encoded["image_grid_thw"] is not None
    # no pixels are kept alive
    assert not any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in encoded.values())


def test_drawing_does_not_change_what_is_drawn():
    pruning = pruned(qwen_vl(), qwen_batch(question(Picture(4, 6))))
    before = pruning.keep_mask.clone(), pruning.scores.clone()
    shown = noise(60, 40)
    pixels = np.asarray(shown).copy()
    pruning.overlay(shown)
    assert torch.equal(pruning.keep_mask, before[0])
    assert torch.equal(pruning.scores, before[1])
    assert (np.asarray(shown) == pixels).all()


def test_arrays_and_images_of_any_mode_are_pictures():
    pruning = pruned(qwen_vl(), qwen_batch(question(Picture(4, 6))))
    shown = noise(60, 40)
    page = np.asarray(pruning.overlay(shown))
    array = np.asarray(shown)
    for same in ([shown], array, np.moveaxis(array, 2, 0), array / 255.0, torch.from_numpy(array.copy())):
        assert np.abs(np.asarray(pruning.overlay(same)).astype(int) - page).max() <= 2
    for mode in ("L", "RGBA", "P", "1"):
        assert pruning.overlay(shown.convert(mode)).size == (page.shape[1], page.shape[0])


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ([noise(60, 40)] * 2, ValueError, "image: expected 1 picture for row 0, got 2; pass all pictures"),
        ([], ValueError, "got an empty list"),
        ("cat.png", TypeError, "got str; open files with PIL.Image.open"),
        (np.zeros((4, 5, 7)), ValueError, "got an array of shape [4, 5, 7]"),
        (noise(40, 60), ValueError, "expected a picture that becomes 4 rows of 6 visual tokens, got one of 40 x 60"),
        ([[noise(60, 40)] * 3], ValueError, "expected one picture as picture 1, got 3 frames"),
        ([[]], ValueError, "got a video without frames"),
    ],
)
def test_what_is_no_picture_of_the_prompt_is_refused(image, error, message):
    pruning = pruned(qwen_vl(), qwen_batch(question(Picture(4, 6))))
    with pytest.raises(error) as caught:
        pruning.overlay(image)
    assert message in str(caught.value)


def test_a_video_needs_its_frames():
    pruning = pruned(qwen_vl(), qwen_batch(question(Picture(2, 3, 4))))
    with pytest.raises(ValueError, match="image: expected the frames of a video as picture 1, got one picture"):
        pruning.overlay(noise(30, 20))
    with pytest.raises(ValueError, match="expected a video of at least 4 frames, got 3 for video 1; pass the picture"):
        pruning.overlay([noise(30, 20)] * 3)


def test_before_a_prompt_and_without_images_there_is_nothing_to_draw():
    model = qwen_vl()
    pruning = prune(model, 0.5, method="random")
    with pytest.raises(ValueError, match="cannot draw a prompt before one with images was pruned"):
        pruning.overlay(noise(60, 40))
    with pytest.raises(ValueError, match="cannot draw a prompt before one with images was pruned"):
        pruned(model, qwen_batch(words(6))).overlay(noise(60, 40))
    pruning = pruned(model, qwen_batch(question(Picture(4, 6)), words(6)))
    with pytest.raises(ValueError, match="row: expected a row with an image or a video, got row 1, which is text"):
        pruning.overlay(noise(60, 40), row=1)
    with pytest.raises(ValueError, match="row: expected 0 to 1, the rows that the model saw, got 2"):
        pruning.overlay(noise(60, 40), row=2)
    with pytest.raises(TypeError, match="row: expected an int, got str"):
        pruning.overlay(noise(60, 40), row="0")


def test_an_unknown_family_says_so_and_draws_its_tokens_in_order(monkeypatch):
    from hawk_kernels.pictures import regions

    monkeypatch.setattr(regions, "GEOMETRIES", {})
    pruning = pruned(qwen_vl(), qwen_batch(question(Picture(4, 6))))
    (region,) = pruning._pruned_prompt.regions(noise(60, 40), 0, None)
    assert "is not known" in region.note
    assert region.sheets[0].box is None
    assert sorted(t for t in region.sheets[0].tokens.ravel().tolist() if t >= 0) == region.positions.tolist()
    assert pruning.overlay(noise(60, 40)).width > 500


def test_a_processor_tells_how_it_cuts():
    from transformers import CLIPImageProcessorPil

    pruning = pruned(tiny_model("llava"), batch("llava", question(BY_NAME["llava"].picture)))
    wide = noise(80, 40)
    (cut,) = pruning._pruned_prompt.regions(wide, 0, None)
    assert cut.sheets[0].box == (0.25, 0.0, 0.75, 1.0)
    (whole,) = pruning._pruned_prompt.regions(wide, 0, CLIPImageProcessorPil(do_center_crop=False))
    assert whole.sheets[0].box == WHOLE
    assert "processor= would tell" in cut.sheets[0].name
    (told,) = pruning._pruned_prompt.regions(wide, 0, CLIPImageProcessorPil())
    assert told.sheets[0].name == "the middle of the picture"
    smaller = CLIPImageProcessorPil(size={"shortest_edge": 448}, crop_size={"height": 224, "width": 224})
    (inner,) = pruning._pruned_prompt.regions(wide, 0, smaller)
    assert inner.sheets[0].box == (0.375, 0.25, 0.625, 0.75)


def test_a_missing_pillow_is_one_line_with_the_command(monkeypatch):
    pruning = pruned(qwen_vl(), qwen_batch(question(Picture(4, 6))))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"^drawing a prompt needs pillow, .*: pip install pillow$"):
        pruning.overlay(None)
