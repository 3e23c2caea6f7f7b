"""VidCom2 keeps what its literal reference keeps, and its rounding is the release's where that adds up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_ref.vidcom2_select import release_counts, vidcom2_select
from hawk_kernels import prune
from hawk_kernels.methods import VidCom2
from hawk_kernels.methods.vidcom2 import frame_weights, likenesses, webster_key
from hawk_kernels.ops.select_topk import select_topk
from hawk_kernels.selection import kept_count
from tests.family_checks import model_of, needs
from tests.method_checks import GivenView, against_its_reference, check_choice
from tests.tiny_families import batch
from tests.tiny_models import VIDEO, Picture, question

IMAGES = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)).map(lambda x: [(x[1], x[2])] * x[0]),
    min_size=1,
    max_size=3,
)
RATIOS = st.integers(1, 30) | st.floats(0.05, 1.0)


@against_its_reference
def test_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    def choose(layer, row, places, count, frames):
        kept = torch.zeros(len(places), dtype=torch.bool)
        kept[vidcom2_select(layer.embeds[row, places], [h * w for h, w in frames], count)[0]] = True
        return kept

    check_choice(three_layers, "vidcom2", budget, keep_ratio, choose)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(IMAGES, min_size=1, max_size=3), r=RATIOS, seed=st.integers(0, 99), per_image=st.booleans())
def test_ragged_rows_keep_what_the_reference_keeps(rows, r, seed, per_image):
    sizes = [[sum(h * w for h, w in image) for image in row] for row in rows]
    lengths = [sum(row) for row in sizes]
    embeddings = torch.randn(len(rows), max(lengths), 6, generator=torch.Generator().manual_seed(seed))
    view = GivenView(lengths, sizes if per_image else None, r, embeddings=embeddings, frames=rows)
    found = VidCom2().select(view, r)
    for row, images in enumerate(rows):
        start = 0
        for unit in images if per_image else [[frame for image in images for frame in image]]:
            frames = [h * w for h, w in unit]
            stop = start + sum(frames)
            kept, likeness = vidcom2_select(embeddings[row, start:stop], frames, r)
            assert found.mask[row, start:stop].nonzero().flatten().tolist() == kept
            assert torch.allclose(-found.scores[row, start:stop], torch.tensor(likeness).float(), atol=1e-5)
            start = stop
    assert (found.scores[~view.candidates] == -torch.inf).all()


def test_an_unusual_frame_keeps_more():
    torch.manual_seed(0)
    still = torch.randn(1, 6, 8)
    unusual = -still + 0.5 * torch.randn(1, 6, 8)
    video = torch.cat([still, still + 0.01 * torch.randn(1, 6, 8), unusual, still], dim=1)
    view = GivenView([24], embeddings=video, frames=[[[(2, 3)] * 4]])
    of_frames = VidCom2().select(view, 12).mask.view(4, 6).sum(dim=1).tolist()
    assert of_frames[2] == max(of_frames) > 3
    assert min(of_frames) >= 1


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), frames=st.integers(1, 6), size=st.integers(2, 20), r=st.floats(0.1, 0.9))
def test_shares_are_those_of_the_release_where_these_add_up(seed, frames, size, r):
    embeddings = torch.randn(1, frames * size, 8, generator=torch.Generator().manual_seed(seed))
    frame_of = torch.arange(frames).repeat_interleave(size)[None]
    candidates = torch.ones_like(frame_of, dtype=torch.bool)
    of_video, likeness = likenesses(embeddings, frame_of, frames, candidates)
    weights = frame_weights(of_video, frame_of, frames, candidates)
    counts = release_counts(weights[0].tolist(), r)
    if max(counts) > size:
        return
    starts = torch.arange(frames)[None] * size
    key = webster_key(-likeness, weights, frame_of, starts, candidates)
    kept = select_topk(key, sum(counts)).mask
    assert kept.view(frames, size).sum(dim=1).tolist() == counts


def test_a_share_close_to_a_half_is_rounded_as_in_the_release():
    """Of 400 tokens each, a quarter of the video is 110.51 and 89.49 tokens, which the release rounds to 111 and 89."""
    share, size = 0.6051, 400
    of_video = torch.full((1, 2 * size), 3.0)
    of_video[0, :size] -= 0.01 * math.log(share / (1 - share))
    frame_of = torch.arange(2).repeat_interleave(size)[None]
    candidates = torch.ones_like(frame_of, dtype=torch.bool)
    weights = frame_weights(of_video, frame_of, 2, candidates)
    assert release_counts(weights[0].tolist(), 0.25) == [111, 89]
    key = webster_key(torch.rand(1, 2 * size), weights, frame_of, torch.tensor([[0, size]]), candidates)
    assert select_topk(key, 0.25).mask.view(2, size).sum(dim=1).tolist() == [111, 89]


def test_tokens_that_are_not_finite_come_last_and_equal_ones_in_order():
    embeddings = torch.randn(1, 12, 6)
    embeddings[0, 4, 0], embeddings[0, 7, 2] = torch.nan, torch.inf
    view = GivenView([12], embeddings=embeddings, frames=[[[(2, 3)] * 2]])
    kept = VidCom2().select(view, 10)
    assert kept.mask[0].logical_not().nonzero().flatten().tolist() == [4, 7]
    assert kept.scores[0].isnan().nonzero().flatten().tolist() == [4, 7]
    same = GivenView([6], embeddings=torch.ones(1, 6, 4), frames=[[[(1, 3)] * 2]])
    assert VidCom2().select(same, 3).mask[0].nonzero().flatten().tolist() == [0, 1, 3]
    one = GivenView([1], embeddings=torch.randn(1, 1, 4), frames=[[[(1, 1)]]])
    assert VidCom2().select(one, 0.1).mask.all()


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_vl"])
@torch.no_grad()
def test_a_video_in_other_families(name):
    needs(name)
    tiny, inputs = model_of(name), batch(name, question(Picture(2, 3, frames=6)))
    with prune(tiny, 0.4, method="vidcom2", budget="per_image") as pruning:
        tiny(**inputs)
    visual = inputs["input_ids"][0] == VIDEO
    of_frames = pruning.keep_mask[0, visual].view(-1, 6).sum(dim=1)
    assert of_frames.sum() == kept_count(0.4, int(visual.sum()))
    assert (of_frames >= 1).all()
