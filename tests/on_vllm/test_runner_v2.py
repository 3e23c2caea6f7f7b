"""vLLM's model runner V2 asks the model for rows and positions through `MultiModalPruner`; it needs no device for that.

What of V2 runs on a GPU alone is not tested here: `python -m bench.vllm_gpu` is for a machine that has one.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.model_states.mm_pruning import MultiModalPruner

from hawk_kernels.hf.choose_tokens import Chooser
from hawk_kernels.hf.question import Markers
from hawk_kernels.vllm import models
from hawk_kernels.vllm.choosing import PictureChooser
from hawk_kernels.vllm.settings import read_settings

IMAGE, VIDEO, START, END, HIDDEN, VOCABULARY = 90, 91, 92, 93, 8, 100
GRIDS = ((1, 5, 4), (1, 3, 6))


class Features(SimpleNamespace):
    """What vLLM knows of a picture or video in a prompt."""


class Parts:
    """What the plugin's part of a model finds in the rest."""

    def __init__(self, method: str) -> None:
        self._settings = read_settings(SimpleNamespace(hawk={"method": method}), 0.6)
        embeddings = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0))
        self._chooser = PictureChooser(
            Chooser(self._settings.method, self._settings.keep_ratio),
            SimpleNamespace(device=lambda default: default),
            (IMAGE, VIDEO),
            Markers(vision_ends=(END,)),
            lambda ids: embeddings[ids],
            hidden_size=HIDDEN,
        )
        self.visual = SimpleNamespace(spatial_merge_size=2)
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(hidden_size=HIDDEN),
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
        )


class Model(Parts, models.PrunesVisualTokens):
    """A model like Qwen2.5-VL."""

    def iter_mm_grid_thw(self, features):
        for feature in features:
            yield feature.mm_position.offset, *feature.grid, 1.0


class RopeState:
    """Positions of one request, as V2 keeps them."""

    def __init__(self, positions):
        self.positions, self.delta = positions, None

    def read_prefill_positions(self, _, length):
        return self.positions[:, :length]

    def update_prefill_positions(self, _, positions, delta):
        self.positions, self.delta = positions, delta


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(models, "get_tp_group", lambda: SimpleNamespace(world_size=1))


def request(model):
    """Return a prompt of two pictures, what the encoder cache holds of them, and their places in it."""
    ids, items, features = [1, 2], [], []
    for number, (frames, height, width) in enumerate(GRIDS):
        ids.append(START)
        rows = random_rows(frames * height * width, HIDDEN, seed=number + 1)
        item = model._packed(rows, (frames, height * 2, width * 2))
        features.append(feature(len(ids), item, (frames, height, width)))
        items.append((rows, item))
        ids += [IMAGE] * len(item) + [END]
    return [*ids, 3, 4, 5], items, features


def random_rows(count, width, seed):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def feature(offset, item, grid, modality="image"):
    """Return what vLLM knows of a picture or video that begins at `offset`."""
    place = SimpleNamespace(
        offset=offset, length=len(item), get_embeds_indices_in_range=lambda start, stop: (start, stop)
    )
    patches = SimpleNamespace(data=torch.tensor(grid) * torch.tensor([1, 2, 2]))
    return Features(
        mm_position=place,
        grid=grid,
        identifier=str(offset),
        modality=modality,
        data={f"{modality}_grid_thw": patches},
    )


def read_in_steps(model, steps, prompt=request):
    """Return the rows and positions of a prompt that is read in `steps`, and in a last one what is left of it."""
    ids, items, features = prompt(model)
    positions, delta = model.get_mrope_input_positions(ids, features)
    rope = RopeState(positions)
    pruner = MultiModalPruner(model, rope, SimpleNamespace(mm_features={"a": features}), HIDDEN)
    states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=torch.tensor([ids])))
    rows, done = [], 0
    for step in [*steps, len(ids) - sum(steps)]:
        parts = []
        for (_, item), feature in zip(items, features, strict=True):
            begin = feature.mm_position.offset
            start, stop = max(done - begin, 0), min(done + step - begin, len(item))
            if start < stop:
                parts.append(item[start:stop])
        batch = SimpleNamespace(
            req_ids=["a"],
            idx_mapping_np=np.array([0]),
            prefill_len_np=np.array([len(ids)]),
            num_computed_prefill_tokens_np=np.array([done]),
            num_scheduled_tokens=np.array([step]),
        )
        rows += pruner.recompute(parts, batch, states)
        done += step
    return torch.cat(rows), rope, delta, ids, items, features


@pytest.mark.parametrize("method", ["divprune", "downsample", "cdpruner", "random"])
@pytest.mark.parametrize("steps", [[], [5, 7], [4, 1, 1, 1, 8]], ids=["whole", "in chunks", "in small chunks"])
@pytest.mark.usefixtures("alone")
def test_rows_and_positions_do_not_depend_on_chunks(method, steps):
    rows, rope, delta, ids, items, features = read_in_steps(Model(method), steps)
    assert rows.shape == (sum(len(item) for _, item in items), HIDDEN)
    assert rope.delta == delta
    corner, place = 3, 0
    for (every, item), feature in zip(items, features, strict=True):
        _, height, width = feature.grid
        offset = feature.mm_position.offset
        at = rope.positions[:, offset : offset + len(item)]
        assert (at[0] == corner).all()
        cells = (at[1] - corner) * width + at[2] - corner
        assert (cells.diff() > 0).all()
        assert torch.equal(rows[place : place + len(item)], every[cells])
        place += len(item)
        corner += max(height, width)
        # the end of the picture, then the start of the next
        assert (rope.positions[:, offset + len(item)] == corner).all()
        corner += 2
    assert len(ids) + delta == corner - 1 + 3


@pytest.mark.usefixtures("alone")
def test_one_choice_whether_a_picture_comes_alone_or_with_another():
    whole, *_ = read_in_steps(Model("cdpruner"), [])
    apart, *_ = read_in_steps(Model("cdpruner"), [13])
    assert torch.equal(whole, apart)


class Qwen3(Parts, models.PrunesVideosWithTimestamps):
    """A model like Qwen3-VL: a timestamp of two tokens, and rows that go to DeepStack."""

    _tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [6, int(float(text.split()[0][1:]))])


LEVELS = 2
VIDEO_GRIDS = ((3, 2, 3), (4, 3, 2))
TEXTS_OF_FRAME = 4


def request_with_videos(model):
    """Return a prompt of two videos and a picture, and what `request` returns of them."""
    ids, items, features = [1, START], [], []
    for number, grid in enumerate(VIDEO_GRIDS):
        frames, height, width = grid
        rows = random_rows(frames * height * width, HIDDEN * (1 + LEVELS), seed=number)
        item = model._packed_video(rows, (frames, height * 2, width * 2), [float(time) for time in range(frames)])
        features.append(feature(len(ids), item, grid, "video"))
        items.append((rows, item))
        texts = [token for time in range(frames) for token in (6, time, START, END)]
        ids += [VIDEO] * (len(item) - len(texts)) + texts
    rows = random_rows(12, HIDDEN * (1 + LEVELS), seed=9)
    item = model._packed(rows, (1, 6, 8))
    ids += [END, START]
    features.append(feature(len(ids), item, (1, 3, 4)))
    items.append((rows, item))
    return [*ids, *[IMAGE] * len(item), END, 3, 4, 5], items, features


@pytest.mark.parametrize("method", ["evs", "vidcom2", "divprune", "cdpruner", "random"])
@pytest.mark.parametrize("steps", [[], [5, 7, 16], [9, 1, 1, 1, 8, 2, 5, 3, 1, 1, 1]], ids=["whole", "few", "many"])
@pytest.mark.usefixtures("alone")
def test_frames_and_texts_of_a_video_stand_in_their_order(method, steps):
    model = Qwen3(method)
    rows, rope, delta, ids, items, features = read_in_steps(model, steps, request_with_videos)
    assert rope.delta == delta
    start = end = 0
    for (every, item), of_item, grid in zip(items, features, (*VIDEO_GRIDS, None), strict=True):
        offset = of_item.mm_position.offset
        own, at = rows[start : start + len(item)], rope.positions[:, offset : offset + len(item)]
        start += len(item)
        if grid is None:
            break
        # the first video begins after two tokens of text, the second right after the first
        corner = end or 2
        frames, height, width = grid
        is_text = (own[:, HIDDEN:] == 0).all(dim=1)
        assert int(is_text.sum()) == TEXTS_OF_FRAME * frames
        texts = [token for time in range(frames) for token in (6, time, START, END)]
        assert torch.equal(own[is_text][:, :HIDDEN], model._chooser.embed(torch.tensor(texts)))
        side = max(height, width)
        per_frame = TEXTS_OF_FRAME + side
        wanted = [corner + frame * per_frame + text for frame in range(frames) for text in (0, 1, 2, 3 + side)]
        assert at[0, is_text].tolist() == wanted
        frame = (is_text.cumsum(0) - 3).div(TEXTS_OF_FRAME, rounding_mode="floor")[~is_text]
        line, column = (at[axis, ~is_text] - at[0, ~is_text] for axis in (1, 2))
        cells = (frame * height + line) * width + column
        assert (cells.diff() > 0).all()
        assert torch.equal(own[~is_text], every[cells])
        end = wanted[-1] + 1
    assert start == len(rows)
    assert delta + len(ids) == rope.positions[0, -1] + 1
