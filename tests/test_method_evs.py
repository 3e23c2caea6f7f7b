"""EVS scores what its literal reference scores, and keeps what changes between frames."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import csrc_ref
from csrc_ref.evs_scores import bayer, evs_scores
from hawk_kernels import prune
from hawk_kernels.methods import EVS
from tests.family_checks import model_of, needs
from tests.method_checks import GivenView, against_its_reference, check_choice
from tests.tiny_families import batch
from tests.tiny_models import IMAGE, VIDEO, Picture, question, qwen_batch

IMAGES = st.lists(
    # some videos end with a newline
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.booleans()).map(
        lambda x: [(x[1], x[2])] * x[0] + [(1, 1)] * x[3]
    ),
    min_size=1,
    max_size=3,
)


@against_its_reference
def test_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    def choose(layer, row, places, count, frames):
        scores, start = [], 0
        for image in layer.images(row):
            if not set(image.tolist()) & set(places.tolist()):
                continue
            own, length = [], 0
            while length < len(image):
                own.append(frames[start])
                length += frames[start][0] * frames[start][1]
                start += 1
            scores += evs_scores(layer.embeds[row, image], own)
        return csrc_ref.select_topk(torch.tensor(scores), count).mask

    check_choice(three_layers, "evs", budget, keep_ratio, choose)


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(IMAGES, min_size=1, max_size=3), seed=st.integers(0, 99), wrong=st.booleans())
def test_scores_of_ragged_rows_are_those_of_the_reference(rows, seed, wrong):
    generator = torch.Generator().manual_seed(seed)
    lengths = [sum(h * w for image in row for h, w in image) for row in rows]
    # few values, so that cells repeat exactly
    embeddings = torch.randint(-1, 2, (len(rows), max(lengths), 3), generator=generator).float()
    if wrong:
        embeddings[0, 0] = torch.tensor([0.0, torch.nan, torch.inf])
    view = GivenView(lengths, embeddings=embeddings, frames=rows)
    scores = EVS().score(view)
    for row, images in enumerate(rows):
        start = 0
        for image in images:
            stop = start + sum(h * w for h, w in image)
            expected = torch.tensor(evs_scores(embeddings[row, start:stop], image))
            assert torch.allclose(scores[row, start:stop], expected, atol=1e-6, equal_nan=True)
            start = stop
    assert (scores[~view.candidates] == -torch.inf).all()


def test_the_first_frame_stays_and_then_the_cells_that_change():
    frame = torch.eye(4)
    changed = frame.clone()
    changed[2] = -changed[2]
    changed[1] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    view = GivenView([12], embeddings=torch.cat([frame, frame, changed])[None], frames=[[[(2, 2)] * 3]])
    for count, kept in (
        (4, [0, 1, 2, 3]),
        (5, [0, 1, 2, 3, 10]),
        (6, [0, 1, 2, 3, 9, 10]),
        (7, [0, 1, 2, 3, 4, 9, 10]),
    ):
        assert EVS().select(view, count).mask[0].nonzero().flatten().tolist() == kept


def test_a_still_image_keeps_an_even_grid():
    view = GivenView([16], embeddings=torch.randn(1, 16, 3), frames=[[[(4, 4)]]])
    assert EVS().select(view, 4).mask[0].nonzero().flatten().tolist() == [0, 2, 8, 10]
    assert EVS().select(view, 8).mask[0].nonzero().flatten().tolist() == [0, 2, 5, 7, 8, 10, 13, 15]
    assert sorted(bayer(y, x) * 16 for y in range(4) for x in range(4)) == list(range(16))


@pytest.mark.parametrize(("name", "token"), [("qwen3_vl", VIDEO), ("glm4v", IMAGE), ("exaone4_5", VIDEO)])
@torch.no_grad()
def test_a_video_whose_frames_repeat_keeps_the_first(name, token):
    needs(name)
    tiny, inputs = model_of(name), batch(name, question(Picture(2, 3, frames=6)))
    pixels = inputs["pixel_values_videos"]
    steps = len(pixels) // 24
    inputs["pixel_values_videos"] = pixels[:24].repeat(steps, *[1] * (pixels.dim() - 1))
    with prune(tiny, 6, method="evs", budget="per_image") as pruning:
        tiny(**inputs)
    visual = inputs["input_ids"][0] == token
    assert pruning.keep_mask[0, visual].view(-1, 6).sum(dim=1).tolist() == [6, *[0] * (int(visual.sum()) // 6 - 1)]


FRAMES = {
    "qwen2_5_vl": [(2, 3)] * 6,
    "glm4v": [(2, 3)] * 6,
    "ernie4_5_vl_moe": [(2, 3)] * 3,
    "llava_next_video": [(1, 1)] * 6,
    "llava_onevision": [(1, 1)] * 7,
    "video_llava": [(1, 10)] * 6,
    "minicpmv4_6": [(3, 3)] * 6,
    "video_llama_3": [(6, 6)],
}


@pytest.mark.parametrize("name", FRAMES)
@torch.no_grad()
def test_the_frames_of_a_video(name):
    needs(name)

    class Asks(EVS):
        def score(self, view):
            seen.append(view.frames())
            return super().score(view)

    seen = []
    tiny, inputs = model_of(name), batch(name, question(Picture(2, 3, frames=6)))
    with prune(tiny, 0.5, method=Asks()):
        tiny(**inputs)
    assert seen == [[[FRAMES[name]]]]


@torch.no_grad()
def test_nothing_but_the_pictures_counts(three_layers):
    kept = []
    for seed in (0, 1):
        inputs = qwen_batch(question(Picture(2, 3, frames=4), seed=seed))
        inputs["pixel_values_videos"] = torch.randn(
            inputs["pixel_values_videos"].shape, generator=torch.Generator().manual_seed(0)
        )
        with prune(three_layers, 0.5, method="evs") as pruning:
            three_layers(**inputs)
        kept.append(pruning.keep_mask[inputs["input_ids"] == VIDEO])
    assert torch.equal(*kept)
