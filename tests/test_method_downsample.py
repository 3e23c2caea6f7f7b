"""Down-sampling keeps the places that its literal reference keeps, in images, videos and other families."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csrc_ref.downsample_places import downsample_places as reference
from hawk_kernels import prune
from hawk_kernels.methods.downsample import downsample_places
from tests.family_checks import model_of, prompts
from tests.method_checks import against_its_reference, check_choice
from tests.tiny_families import BY_NAME, batch
from tests.tiny_models import VIDEO, Picture, question


@against_its_reference
def test_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    def choose(layer, row, places, count, frames):
        kept = torch.zeros(len(places), dtype=torch.bool)
        kept[reference(frames, count)] = True
        return kept

    check_choice(three_layers, "downsample", budget, keep_ratio, choose)


@given(
    frames=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
    share=st.floats(0, 1),
)
def test_places_are_those_of_exact_fractions(frames, share):
    total = sum(height * width for height, width in frames)
    count = max(1, round(share * total))
    places = downsample_places(frames, count)
    assert places == reference(frames, count)
    assert len(places) == count
    assert places == sorted(set(places))
    assert places[0] >= 0
    assert places[-1] < total


def test_a_quarter_of_a_square_is_every_second_token_of_every_second_line():
    assert downsample_places([(4, 4)], 4) == [5, 7, 13, 15]
    assert downsample_places([(4, 4)], 1) == [10]
    assert downsample_places([(2, 8)], 4) == [9, 11, 13, 15]
    # frames of a video share a budget, and where it is short, frames are left out evenly
    assert downsample_places([(2, 2)] * 4, 4) == [3, 7, 11, 15]
    assert downsample_places([(2, 2)] * 4, 2) == [7, 15]


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "llava_onevision", "gemma3", "video_llama_3"])
@torch.no_grad()
def test_other_families(name):
    tiny = model_of(name)
    for prompt in ("padded batch", *(["video"] if BY_NAME[name].video else [])):
        with prune(tiny, 0.3, method="downsample") as pruning:
            tiny(**batch(name, *prompts(name)[prompt]))
        assert all(sample.visual_tokens_after for sample in pruning.stats.samples)


@torch.no_grad()
def test_frames_that_are_set_apart_by_text_are_one_video():
    tiny, inputs = model_of("qwen3_vl"), batch("qwen3_vl", question(Picture(2, 3, frames=6)))
    with prune(tiny, 3, method="downsample", budget="per_image") as pruning:
        tiny(**inputs)
    visual = inputs["input_ids"][0] == VIDEO
    of_frames = pruning.keep_mask[0, visual].view(3, -1).sum(1)
    assert pruning.stats.samples[0].budget_per_image == [3]
    assert of_frames.tolist() == [1, 1, 1]
