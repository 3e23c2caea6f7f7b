"""The parts of the vLLM plugin that need no vLLM; `make vllm` tests the rest beside a real engine."""

import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from hawk_kernels import prune
from hawk_kernels.checkpoint import TINY_MODEL, load_processor
from hawk_kernels.head_weights import resolve_head_weights
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.choose_tokens import Chooser
from hawk_kernels.hf.encoders.recorder import recorder_for
from hawk_kernels.methods import METHODS, Method, resolve_method
from hawk_kernels.selection import Merge, kept_count
from hawk_kernels.vllm.choosing import PictureChooser, Place
from hawk_kernels.vllm.columns import Columns
from hawk_kernels.vllm.folding import NOTE_COLUMNS, Noted, fold, unfold
from hawk_kernels.vllm.positions import Media, media_positions, positions_among_texts, prompt_positions
from hawk_kernels.vllm.settings import read_settings

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OF_THE_ENCODER = ("fastervlm", "hiprune", "holov", "prumerge", "visionzip", "vispruner")


def config(**hawk):
    return SimpleNamespace(hawk=hawk)


def test_the_package_imports_nothing_of_the_plugin_and_the_plugin_no_vllm():
    program = (
        "import sys, hawk_kernels, hawk_kernels.hf.prune;"
        "assert not [m for m in sys.modules if m.startswith('hawk_kernels.vllm')];"
        "import hawk_kernels.vllm, hawk_kernels.vllm.settings, hawk_kernels.vllm.choosing, hawk_kernels.vllm.folding;"
        "assert 'vllm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_hawk_is_the_usual_method():
    settings = read_settings(SimpleNamespace(), 0.8)
    assert (settings.method.name, settings.head_weights, settings.reads_prompt) == ("hawk", None, True)
    assert settings.kept_count(36) == kept_count(0.2, 36) == 7


@pytest.mark.parametrize("name", ["divprune", "key_norm", "downsample", "evs", "vidcom2", *OF_THE_ENCODER])
def test_methods_that_look_at_a_picture_alone_share_caches(name):
    assert not read_settings(config(method=name), 0.5).reads_prompt


@pytest.mark.parametrize("name", ["hawk", "heed", "cdpruner", "dart", "random", "mmtok"])
def test_other_methods_do_not(name):
    assert read_settings(config(method=name), 0.5).reads_prompt


@pytest.mark.parametrize(
    ("given_config", "rate", "error", "message"),
    [
        (config(), None, ValueError, "got None; pass --video-pruning-rate 0.8"),
        (config(), 0.0, ValueError, "got 0.0; pass --video-pruning-rate 0.8"),
        (SimpleNamespace(hawk="divprune"), 0.8, TypeError, "expected an object in --hf-overrides, got 'divprune'"),
        (config(keep_ratio=0.2), 0.8, TypeError, "'keep_ratio'; leave it out and pass --video-pruning-rate"),
        (config(budget="shared"), 0.8, TypeError, "'budget'; leave it out: in vLLM each image"),
        (config(query=[]), 0.8, TypeError, "'query'; leave it out"),
        (config(method="nothing"), 0.8, ValueError, "method: expected one of"),
        (config(method="divprune", head_weights="uniform"), 0.8, TypeError, "method 'divprune' uses none"),
        (config(normalise="l2"), 0.8, TypeError, "method 'hawk' has no option 'normalise'"),
        (config(method="fastv"), 0.8, TypeError, "got 'fastv', but vLLM prunes before the first layer"),
        (config(method="sparsevlm"), 0.8, TypeError, "got 'sparsevlm', but vLLM prunes before the first layer"),
        (config(method="hawk_rope"), 0.8, TypeError, "got 'hawk_rope', but vLLM projects"),
    ],
)
def test_what_is_missing_or_wrong_is_said(given_config, rate, error, message):
    with pytest.raises(error) as caught:
        read_settings(given_config, rate)
    assert message in str(caught.value)


def test_a_refusal_names_every_method_that_works_and_no_other():
    with pytest.raises(TypeError) as caught:
        read_settings(config(method="fastv"), 0.5)
    named = set(re.findall(r"'(\w+)'", str(caught.value).split("; use ")[1]))
    for name in METHODS:
        if name in named:
            assert read_settings(config(method=name), 0.5).method.name == name
        else:
            with pytest.raises(TypeError, match="expected one that works inside vLLM"):
                read_settings(config(method=name), 0.5)


@given(
    rows=st.integers(1, 700),
    width=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
)
def test_a_folded_picture_is_found_again_from_any_slice(rows, width, dtype, cut):
    whole = torch.randn(rows, width).to(dtype)
    places = 1 + round(cut[0] * (rows - 1))
    folded = fold(whole, places, (2, 300, 70000))
    assert len(folded) == places
    start = round(cut[1] * (places - 1))
    stop = start + 1 + round(cut[2] * (places - start - 1))
    found = unfold(folded[start:stop])
    assert torch.equal(found.rows, whole)
    assert (found.grid, found.start, found.places) == ((2, 300, 70000), start, places)


def test_a_copy_of_a_slice_is_refused():
    folded = fold(torch.randn(20, 6), 5, (1, 4, 5))
    with pytest.raises(RuntimeError, match="cannot find the whole picture from a part of it"):
        unfold(folded[2:4].clone())


@pytest.mark.parametrize("places", [0, 5])
def test_a_picture_folds_into_as_many_places_as_it_has_rows_or_fewer(places):
    with pytest.raises(ValueError, match="places: expected 1 to 4"):
        fold(torch.randn(4, 2), places, (1, 2, 2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_notes_survive_any_dtype(dtype):
    positions = torch.tensor([[0, 1, 255], [256, 257, 1000], [65535, 4095, 2**24 - 1]])
    rows, visual = torch.randn(3, 8).to(dtype), torch.tensor([False, True, True])
    joined = Noted(rows, positions, visual, start=70000).joined()
    assert joined.shape == (3, 8 + NOTE_COLUMNS)
    assert joined.dtype == dtype
    for first in range(3):
        found = Noted.separated(joined[first:])
        assert torch.equal(found.rows, rows[first:])
        assert torch.equal(found.positions, positions[first:])
        assert torch.equal(found.visual, visual[first:])
        assert found.start == 70000 + first


@given(
    pictures=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    width=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    names=st.lists(st.sampled_from(["object", "deep", "cls", "keys", "features"]), min_size=1, unique=True),
)
def test_what_was_recorded_stays_with_its_picture(pictures, width, dtype, names):
    shapes = {name: {"keys": (2, 3), "features": (5,)}.get(name, ()) for name in names}
    columns = Columns(shapes, dtype)
    count = sum(pictures)
    rows = torch.randn(count, width).to(dtype)
    values = {name: torch.randn(count, *shape) for name, shape in shapes.items()}
    if "features" in values:
        values["features"] = values["features"].to(dtype)
    for name in set(names) - {"features"}:
        values[name].view(-1)[0] = torch.nan
        values[name].view(-1)[-1] = -torch.inf
    wide = columns.joined(rows, values)
    assert wide.dtype == dtype
    assert wide.shape == (count, width + columns.count)
    for start, part in zip(np.cumsum([0, *pictures]), wide.split(pictures), strict=False):
        own = slice(start, start + len(part))
        found_rows, found = columns.separated(part)
        assert torch.equal(found_rows, rows[own])
        assert found.keys() == values.keys()
        for name, value in found.items():
            assert value.dtype == values[name].dtype
            assert torch.equal(value.nan_to_num(7), values[name][own].nan_to_num(7))


@pytest.mark.parametrize("name", ["hiprune", "mmtok"])
def test_embeddings_are_refused_where_the_encoder_is_read(name):
    settings = read_settings(config(method=name), 0.8)
    settings.check_pixels("image", ["pixel_values", "image_grid_thw"])
    message = f"image_embeds: expected pixels with method '{name}', .*send the image itself"
    with pytest.raises(ValueError, match=message):
        settings.check_pixels("image", ["image_embeds", "image_grid_thw"])
    read_settings(config(method="divprune"), 0.8).check_pixels("image", ["image_embeds", "image_grid_thw"])


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "grids",
    [[(1, 9, 3)], [(1, 3, 9)], [(1, 2, 5), (1, 7, 2), (1, 4, 4)]],
    ids=["tall", "wide", "several"],
)
def test_a_whole_prompt_has_the_positions_that_transformers_gives_it(model, grids):
    ids, media = [7, 8], []
    for frames, height, width in grids:
        ids.append(model.config.vision_start_token_id)
        media.append(Media(len(ids), frames * height * width, frames, height, width))
        ids += [model.config.image_token_id] * (frames * height * width) + [model.config.vision_end_token_id, 9]
    token_ids = torch.tensor([ids])
    wanted, wanted_delta = model.model.get_rope_index(
        token_ids,
        mm_token_type_ids=(token_ids == model.config.image_token_id).int(),
        image_grid_thw=torch.tensor(grids) * torch.tensor([1, 2, 2]),
    )
    positions, delta = prompt_positions(len(ids), media)
    for item in media:
        grid = media_positions(item.frames, item.height, item.width)
        positions[:, item.offset : item.offset + item.places] += grid.T
    assert np.array_equal(positions, wanted[:, 0].numpy())
    assert delta == wanted_delta.item()


def test_text_stands_where_it_stood_whatever_is_kept():
    whole, whole_delta = prompt_positions(2 + 12 + 3 + 6 + 1, [Media(2, 12, 1, 3, 4), Media(17, 6, 1, 6, 1)])
    pruned, delta = prompt_positions(2 + 5 + 3 + 1 + 1, [Media(2, 5, 1, 3, 4), Media(10, 1, 1, 6, 1)])
    assert whole[0, [0, 1, 14, 15, 16, 23]].tolist() == pruned[0, [0, 1, 7, 8, 9, 11]].tolist() == [0, 1, 6, 7, 8, 15]
    assert whole_delta + whole.shape[1] == delta + pruned.shape[1] == 16


def test_frames_of_a_video_are_apart_by_whole_steps():
    assert media_positions(3, 1, 2, 2.5)[:, 0].tolist() == [0, 0, 2, 2, 5, 5]


@given(grid=st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4)), fps=st.floats(0.05, 60))
@example(grid=(12, 1, 1), fps=2 / 0.7)
def test_a_video_and_the_text_after_it_have_the_positions_that_transformers_gives_them(model, grid, fps):
    tokens, interval = math.prod(grid), torch.tensor([2 / fps])
    ids = torch.tensor([[7, 8, *[model.config.video_token_id] * tokens, 9, 9]])
    wanted, _ = model.model.get_rope_index(
        ids,
        mm_token_type_ids=2 * (ids == model.config.video_token_id).int(),
        video_grid_thw=torch.tensor([grid]) * torch.tensor([1, 2, 2]),
        second_per_grid_ts=interval,
    )
    seconds = model.config.vision_config.tokens_per_second * interval.item()
    positions, delta = prompt_positions(tokens + 4, [Media(2, tokens, *grid, seconds)])
    positions[:, 2 : 2 + tokens] += media_positions(*grid, seconds).T
    assert np.array_equal(positions, wanted[:, 0].numpy())
    # generate goes on from the last token, even where the video ends later
    assert delta + tokens + 4 == positions[0, -1] + 1


@given(
    texts=st.lists(st.integers(1, 5), min_size=2, max_size=6),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dropped=st.integers(0, 4),
)
def test_a_video_with_timestamps_has_the_positions_that_transformers_gives_it(texts, grid, dropped):
    """Each frame counts as a picture, and the text around it as text."""
    from transformers import Qwen3VLConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    height, width = grid
    *before, after = texts
    visual = np.concatenate([[False] * text + [True] * height * width for text in before] + [[False] * after])
    ids = torch.tensor([[7, *np.where(visual, 6, 9), 8, 8]])
    wanted, wanted_delta = Qwen3VLModel.get_rope_index(
        SimpleNamespace(
            config=Qwen3VLConfig(), get_vision_position_ids=Qwen3VLModel.get_vision_position_ids.__get__(0)
        ),
        ids,
        mm_token_type_ids=2 * (ids == 6).int(),
        video_grid_thw=torch.tensor([[len(before), 2 * height, 2 * width]]),
    )
    assert np.array_equal(1 + positions_among_texts(visual, *grid), wanted[:, 0, 1:-2].numpy().T)
    length = ids.shape[1] - min(dropped, visual.sum() - 1)
    media = Media(1, length - 3, len(before), *grid, texts=sum(texts))
    positions, delta = prompt_positions(length, [media])
    assert np.array_equal(positions[:, -2:], wanted[:, 0, -2:].numpy())
    assert delta + length == wanted_delta.item() + ids.shape[1]


@pytest.mark.parametrize(
    "name",
    ["divprune", "downsample", "key_norm", "hawk", "cdpruner", "heed", "dart", "random", "mmtok", *OF_THE_ENCODER],
)
def test_the_tokens_that_stay_are_those_of_prune(model, name):
    processor = load_processor(str(TINY_MODEL))
    from PIL import Image

    samples = TINY_MODEL / "samples"
    content = [{"type": "image"}, {"type": "text", "text": "Which digit is red?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(text=[text], images=[Image.open(samples / "digits_6x9.png")], return_tensors="pt")
    entered = []
    language_model = model.model.language_model
    watch = language_model.layers[0].register_forward_pre_hook(lambda module, args: entered.append(args[0][0]))
    with torch.no_grad(), prune(model, 0.4, method=name) as pruning:
        model(**inputs)
    watch.remove()
    ids = inputs["input_ids"][0].numpy()
    visual = ids == model.config.image_token_id
    wanted = np.flatnonzero(pruning.keep_mask[0].numpy()[visual])

    method, anatomy = resolve_method(name, {}), dissect(model)
    weights = resolve_head_weights(None, model.config, 8).values if method.uses_head_weights else None
    recorder = recorder_for(anatomy, method) if method.reads_encoder() else None
    chooser = PictureChooser(
        Chooser(method, 0.4, head_weights=weights),
        anatomy.projections,
        anatomy.visual_token_ids,
        anatomy.markers,
        model.get_input_embeddings(),
        None if recorder is None else recorder.encoder.project,
    )
    handles = [] if recorder is None else recorder.attach()
    with torch.no_grad():
        rows = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]
    for handle in handles:
        handle.remove()
    recorded = None if recorder is None else recorder.recordings({})["image"].values
    start, count = int(visual.argmax()), len(wanted)
    pruned_ids = np.delete(ids, np.arange(start + count, start + int(visual.sum())))
    reads_prompt = read_settings(config(method=name), 0.6).reads_prompt
    place = Place(pruned_ids, start, count, np.ones(int(visual.sum()), dtype=bool)) if reads_prompt else None
    with torch.no_grad():
        places, merged = chooser.choose(rows, (1, 6, 9), place, recorded)
    assert places.tolist() == wanted.tolist()
    assert (merged is not None) == (name in ("prumerge", "visionzip"))
    torch.testing.assert_close(rows[places] if merged is None else merged, entered[0][start : start + count])


class Averages(Method):
    """Keeps the first tokens, the first of them as the mean of the first and the last."""

    name = "averages"

    def score(self, view):
        return -torch.arange(view.candidates.shape[1]).float().expand(view.candidates.shape)

    def select(self, view, r):
        last = view.candidates.shape[1] - 1
        merge = Merge(torch.tensor([[0, 0]]), torch.tensor([[0, last]]), torch.tensor([[0.5, 0.5]]))
        return super().select(view, r).merging(merge)


@pytest.mark.parametrize("in_prompt", [False, True])
def test_a_method_of_your_own_may_merge_embeddings(model, in_prompt):
    anatomy = dissect(model)
    chooser = PictureChooser(
        Chooser(Averages(), 0.25),
        anatomy.projections,
        anatomy.visual_token_ids,
        anatomy.markers,
        model.get_input_embeddings(),
    )
    rows = torch.randn(16, 128)
    ids = np.array([5, 6, *[model.config.image_token_id] * 4, 7])
    with torch.no_grad():
        places, merged = chooser.choose(
            rows, (1, 4, 4), Place(ids, 2, 4, np.ones(16, dtype=bool)) if in_prompt else None
        )
    assert places.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(merged, torch.cat([(rows[:1] + rows[-1:]) / 2, rows[1:4]]))


def test_a_prompt_without_text_keeps_an_even_grid(model):
    """An error would end the server instead of the request."""
    anatomy = dissect(model)
    chooser = PictureChooser(
        Chooser(resolve_method("cdpruner", {}), 0.25),
        anatomy.projections,
        anatomy.visual_token_ids,
        anatomy.markers,
        model.get_input_embeddings(),
    )
    ids = np.full(4, model.config.image_token_id)
    found = chooser.choose(torch.randn(16, 128), (1, 4, 4), Place(ids, 0, 4, np.ones(16, dtype=bool)))
    assert found.places.tolist() == [5, 7, 13, 15]


def test_the_entry_point_names_the_plugin(repository):
    assert (
        '"vllm.general_plugins": ["hawk_kernels = hawk_kernels.vllm:register"]' in (repository / "setup.py").read_text()
    )
