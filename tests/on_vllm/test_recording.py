"""What is recorded of an encoder: the right numbers, of the right picture, and nothing that outlives the call.

The encoder is a stand-in with the modules of vLLM's that the recorder looks at; it needs no engine.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hawk_kernels.methods import METHODS
from hawk_kernels.vllm import recording
from hawk_kernels.vllm.recording import EncoderRecorder, check_encoder

HEADS, HEAD_DIM, DEPTH, SIDE, WINDOW, OUT = 2, 4, 4, 2, 2, 5
CHANNELS = HEADS * HEAD_DIM
# patches; the second picture has windows that are cut off, the last is a video
GRIDS = [[1, 8, 4], [1, 6, 10], [2, 4, 6]]


class Attend(nn.Module):
    scale = HEAD_DIM**-0.5

    def forward(self, query, key, value, cu_seqlens):
        return value


class Rotate(nn.Module):
    def forward(self, heads, cos, sin):
        return heads * 2 + 1


class Attention(nn.Module):
    """The attention of one layer; `seen` keeps its queries and keys, before and after rotation."""

    tp_size, num_attention_heads_per_partition, hidden_size_per_attention_head = 1, HEADS, HEAD_DIM

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.attn, self.apply_rotary_emb = Attend(), Rotate()
        self.seen = ()

    def forward(self, x):
        heads = self.qkv(x)[:, 0].unflatten(-1, (3, HEADS, HEAD_DIM))
        before = torch.stack([heads[:, 0], heads[:, 1]])
        queries, keys = self.apply_rotary_emb(before, None, None)
        self.seen = before[1], queries, keys
        # no backend has to count segments in patches
        value = self.attn(query=queries[None], key=keys[None], value=heads[None, :, 2], cu_seqlens="for a backend")
        return value[0].flatten(1).unsqueeze(1)


class Merger(nn.Module):
    hidden_size = CHANNELS * SIDE**2

    def __init__(self, name_of_norm="ln_q"):
        super().__init__()
        self.out, self.norm_of_patches = nn.Linear(self.hidden_size, OUT), name_of_norm
        self.add_module(name_of_norm, nn.Identity())

    def forward(self, x):
        return self.out(self.get_submodule(self.norm_of_patches)(x).view(-1, self.hidden_size))


class Encoder(nn.Module):
    dtype, out_hidden_size, spatial_merge_size = torch.float32, OUT, SIDE

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Attention()}) for _ in range(DEPTH))
        for block in self.blocks:
            block.attn = block["attn"]
        self.merger = Merger()

    def forward(self, x, grid_thw):
        order = self.order(grid_thw)
        x = x.unflatten(0, (-1, SIDE**2))[order].flatten(0, 1).unsqueeze(1)
        for block in self.blocks:
            x = x + block.attn(x)
        return self.merger(x)[order.argsort()]

    def order(self, grids):
        return torch.arange(sum(t * h * w for t, h, w in grids) // SIDE**2)


class EncoderWithWindows(Encoder):
    fullatt_block_indexes = (1, DEPTH - 1)

    def get_window_index_thw(self, frames, height, width):
        frame, row, column = np.indices((frames, height // SIDE, width // SIDE)).reshape(3, -1)
        window = np.stack([frame, row // WINDOW, column // WINDOW])
        order = np.lexsort(window[::-1])
        _, counts = np.unique(window, axis=1, return_counts=True)
        return torch.from_numpy(order), torch.from_numpy(counts.cumsum() * SIDE**2).int()

    def order(self, grids):
        orders, start = [], 0
        for grid in grids:
            index, _ = self.get_window_index_thw(*grid)
            orders.append(index + start)
            start += len(index)
        return torch.cat(orders)


class EncoderOfQwen3(Encoder):
    def __init__(self):
        super().__init__()
        self.merger = Merger("norm")


ENCODERS = pytest.mark.parametrize("make", [Encoder, EncoderWithWindows])


def pixels(grids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(t * h * w for t, h, w in grids), CHANNELS, generator=generator)


def recorded_of(make, method, grids, x):
    visual = make()
    recorder = EncoderRecorder(visual, method, "qwen2_5_vl_vision")
    with torch.no_grad():
        rows, values = recorder.columns.separated(visual(x, grid_thw=grids))
    return visual, recorder, rows, values


def merged(of_patches, order):
    """Average over the patches of each visual token, in the order of the image."""
    return of_patches.unflatten(0, (-1, SIDE**2)).mean(dim=1)[order.argsort()]


@ENCODERS
def test_attention_received_is_that_of_the_whole_matrix(make):
    visual, _, _, values = recorded_of(make, METHODS["hiprune"](object_layer=1), GRIDS, pixels(GRIDS))
    whole = getattr(visual, "fullatt_block_indexes", range(DEPTH))
    for name, layer in (("object", 1), ("deep", DEPTH)):
        _, queries, keys = visual.blocks[layer - 1].attn.seen
        lengths = []
        for grid in GRIDS:
            if layer - 1 in whole:
                lengths += [grid[1] * grid[2]] * grid[0]
            else:
                lengths += visual.get_window_index_thw(*grid)[1].diff(prepend=torch.zeros(1).int()).tolist()
        received = []
        for q, k in zip(queries.split(lengths), keys.split(lengths), strict=True):
            logits = torch.einsum("nhd,mhd->hnm", q, k) * HEAD_DIM**-0.5
            received.append(logits.softmax(dim=2).mean(dim=0).sum(dim=0))
        torch.testing.assert_close(values[name], merged(torch.cat(received), visual.order(GRIDS)))


@pytest.mark.parametrize("make", [Encoder, EncoderWithWindows, EncoderOfQwen3])
def test_keys_are_those_before_rotation_and_rows_those_that_enter_the_merger(make):
    method = METHODS["prumerge"](cls_layer=2)
    visual, recorder, rows, values = recorded_of(make, method, GRIDS, pixels(GRIDS))
    assert values.keys() == {"cls", "keys", "features"}
    keys, _, _ = visual.blocks[1].attn.seen
    torch.testing.assert_close(values["keys"], merged(keys, visual.order(GRIDS)))
    with torch.no_grad():
        torch.testing.assert_close(recorder.project(values["features"]), rows)


@ENCODERS
@pytest.mark.parametrize("method", ["hiprune", "vispruner", "visionzip"])
def test_a_picture_has_what_it_has_alone(make, method):
    method = METHODS[method]()
    sizes = [t * h * w for t, h, w in GRIDS]
    x = pixels(GRIDS)
    *_, rows, together = recorded_of(make, method, torch.tensor(GRIDS), x)
    start = 0
    for grid, part in zip(GRIDS, x.split(sizes), strict=True):
        *_, own_rows, alone = recorded_of(make, method, [grid], part)
        here = slice(start, start + len(own_rows))
        torch.testing.assert_close(rows[here], own_rows)
        for name, values in alone.items():
            torch.testing.assert_close(together[name][here], values)
        start += len(own_rows)


@ENCODERS
def test_rows_are_as_without_the_recorder_and_of_the_width_that_the_encoder_tells(make):
    x = pixels(GRIDS)
    visual, recorder, rows, _ = recorded_of(make, METHODS["vispruner"](), GRIDS, x)
    plain = make()
    with torch.no_grad():
        torch.testing.assert_close(rows, plain(x, GRIDS), rtol=0, atol=0)
        assert visual(x, GRIDS).shape[1] == visual.out_hidden_size == plain.out_hidden_size + recorder.columns.count


@ENCODERS
def test_nothing_outlives_a_call(make):
    visual = make()
    recorder = EncoderRecorder(visual, METHODS["prumerge"](), "qwen2_5_vl_vision")
    columns = {}
    measure = recording.attention_column_mean

    def watched(*args, **kwargs):
        found = measure(*args, **kwargs)
        columns["received"] = weakref.ref(found)
        return found

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(recording, "attention_column_mean", watched)
        rows = visual(pixels(GRIDS), GRIDS)
        # the merger runs once more after the choice
        recorder.project(recorder.columns.separated(rows)[1]["features"])
    result = weakref.ref(rows)
    del rows
    gc.collect()
    assert columns["received"]() is None
    assert result() is None
    assert not [value for value in vars(recorder).values() if isinstance(value, (torch.Tensor, recording._Run))]


def test_nothing_is_left_of_a_call_that_failed():
    visual = Encoder()
    recorder = EncoderRecorder(visual, METHODS["prumerge"](), "qwen2_5_vl_vision")
    visual.merger.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        visual(pixels(GRIDS), GRIDS)
    assert recorder._run is None


def test_ranks_average_over_their_heads_and_gather_keys(monkeypatch):
    """A rank that sees one of two heads, beside another with the same numbers, measures what one with both does."""
    monkeypatch.setattr(recording, "tensor_model_parallel_all_reduce", lambda x: x * 2)
    monkeypatch.setattr(recording, "tensor_model_parallel_all_gather", lambda x, dim: torch.cat([x, x], dim=dim))
    monkeypatch.setattr(Attention, "tp_size", 2)
    method = METHODS["prumerge"]()
    *_, values = recorded_of(Encoder, method, GRIDS, pixels(GRIDS))
    assert values["keys"].shape[1:] == (2 * HEADS, HEAD_DIM)
    monkeypatch.undo()
    *_, alone = recorded_of(Encoder, method, GRIDS, pixels(GRIDS))
    torch.testing.assert_close(values["cls"], alone["cls"])
    torch.testing.assert_close(values["keys"][:, :HEADS], alone["keys"])


def test_bfloat16_rows_carry_exact_numbers():
    class Half(Encoder):
        dtype = torch.bfloat16

    visual = Half().to(torch.bfloat16)
    recorder = EncoderRecorder(visual, METHODS["hiprune"](), "qwen2_5_vl_vision")
    with torch.no_grad():
        wide = visual(pixels(GRIDS).bfloat16(), GRIDS)
    assert wide.dtype == torch.bfloat16
    _, values = recorder.columns.separated(wide)
    assert values["deep"].dtype == torch.float32
    # 1 on average over the patches of each frame, which bfloat16 would round
    torch.testing.assert_close(values["deep"].mean(), torch.tensor(1.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("model_type", "depth", "layer"), [("qwen2_5_vl_vision", 32, 16), ("qwen2_vl", DEPTH, 2)])
def test_the_usual_layers_are_those_of_prune(model_type, depth, layer):
    class Deep(Encoder):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([self.blocks[0]] * depth)

    recorder = EncoderRecorder(Deep(), METHODS["hiprune"](), model_type)
    assert recorder._layer_of == {"object": layer, "deep": depth}


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(ValueError, match=r"object_layer: expected 1 to 4, .* got 5; None takes layer 2"):
        EncoderRecorder(Encoder(), METHODS["hiprune"](object_layer=5), "qwen2_vl")
    check_encoder(SimpleNamespace(compile_mm_encoder=False), "hiprune")
    with pytest.raises(ValueError, match="compile_mm_encoder: expected False with method 'hiprune'"):
        check_encoder(SimpleNamespace(compile_mm_encoder=True), "hiprune")
