"""VScan keeps and merges what its literal reference keeps and merges, and then what its middle layer attends to."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_ref.pyramiddrop_stages import pyramiddrop_stages
from csrc_ref.vscan_select import vscan_select as reference
from hawk_kernels import prune
from hawk_kernels.hf.families import ENCODERS
from hawk_kernels.methods import LocalAttention, VScan, resolve_method
from hawk_kernels.methods.vscan import windows_of
from hawk_kernels.selection import Merge, kept_count
from tests.family_checks import model_of, prompts, watched
from tests.merging_checks import Encoded, matrix_of, matrix_of_reference
from tests.method_checks import GREEDY, RAGGED, TOLERANCE, GivenView, visual_tokens
from tests.test_inside_stack import MODES, ONE_ROW, both
from tests.test_merge_in_prune import expected_logits
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import BEGIN, END_OF_TURN, Picture, question, qwen_batch, qwen_vl, words

GRIDS = st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7))


def cells(grids):
    return sum(t * h * w for t, h, w in grids)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(GRIDS, min_size=1, max_size=3), min_size=1, max_size=3),
    r=st.integers(1, 60) | st.floats(0.05, 1.0),
    seed=st.integers(0, 2**20),
    per_image=st.booleans(),
    has_cls=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "window": st.sampled_from([None, 1, 2, 3]),
            "local": st.sampled_from([0.0, 0.3, 0.5, 0.9]),
            "allocation": st.sampled_from(["paper", "release"]),
        }
    ),
)
def test_ragged_rows_keep_and_merge_what_the_reference_does(rows, r, seed, per_image, has_cls, options):
    generator = torch.Generator().manual_seed(seed)
    lengths = [cells(grids) for grids in rows]
    shape = len(rows), max(lengths)
    # few values, so that tokens tie, and a NaN
    deep, shallow = (torch.rand(shape, generator=generator).mul(9).round() for _ in range(2))
    deep[0, 0] = shallow[-1, -1] = torch.nan
    embeddings = torch.randn(*shape, 6, generator=generator)
    local = LocalAttention(shallow, [[[grid] for grid in row] for row in rows], has_cls)
    sizes = [[cells([grid]) for grid in row] for row in rows]
    view = GivenView(lengths, sizes if per_image else None, r, embeddings=embeddings, attention=deep, local=local)
    found = VScan(**options).select(view, r)
    side = options.pop("window") or (6 if has_cls else 4)
    maps = []
    for row, grids in enumerate(rows):
        maps.append({})
        start = 0
        for unit in [[grid] for grid in grids] if per_image else [grids]:
            here = slice(start, start + cells(unit))
            given_here = deep[row, here], shallow[row, here], embeddings[row, here]
            kept, merged = reference(*given_here, r, grids=unit, side=side, **options)
            assert found.mask[row, here].nonzero().flatten().tolist() == kept
            assert len(kept) == kept_count(r, cells(unit))
            maps[-1] |= {start + t: {start + s: w for s, w in weights.items()} for t, weights in merged.items()}
            start += cells(unit)
    assert torch.equal(found.mask.sum(dim=1), (found.indices >= 0).sum(dim=1))
    expected = deep.masked_fill(~view.candidates, -torch.inf)
    assert torch.allclose(found.scores, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.allclose(matrix_of(found.merge, shape[1]), matrix_of_reference(maps, shape[1]))


def hand_made(**options):
    """Two lines of 8 tokens, four windows; of the budget of 8 the windows get 4."""
    shallow = torch.tensor([[9.0, 8, 7, 6, 5, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    deep = torch.arange(16.0)[None]
    local = LocalAttention(shallow, [[[(1, 2, 8)]]], True)
    view = GivenView([16], attention=deep, local=local, embeddings=torch.eye(16)[None])
    return VScan(window=2, **options).select(view, 8).mask[0].nonzero().flatten().tolist()


def test_each_window_keeps_its_share_and_the_picture_the_rest():
    # the best of each window, and of the others the last four
    assert hand_made() == [0, 2, 4, 6, 12, 13, 14, 15]
    assert hand_made(allocation="release") == hand_made()
    # six for four windows: one each and a second one where attention is highest
    assert hand_made(local=0.75) == [0, 1, 2, 3, 4, 6, 14, 15]
    # in the order of attention two each at most, which leaves none for the last window
    assert hand_made(local=0.75, allocation="release") == [0, 1, 2, 3, 4, 5, 14, 15]


def test_windows_are_squares_and_the_last_takes_what_is_left_over():
    found = windows_of([[(1, 5, 4)], [(2, 1, 3), (1, 2, 2)]], 2, 20)
    lines = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert found[0].view(5, 4).tolist() == lines
    # frames of a video, narrower than a window, and a picture
    assert found[1, :10].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("budget", ["shared", "per_image"])
@torch.no_grad()
def test_stage_one_gives_the_logits_of_the_means(name, budget):
    """What the encoder attends to, in two of its layers, is computed without the package."""
    model = tiny_model(name)
    pictures = [Picture(3, 4), Picture(2, 5), Picture(4, 4)]
    one, two, three = [BY_NAME[name].picture or picture for picture in pictures]
    rows = [[one, two], [three], []]
    inputs = batch(name, question([one, two]), question(three, seed=3, after=2), [BEGIN, *words(7), END_OF_TURN])
    deep, shallow = (Encoded(model, name, inputs, layer).attention for layer in (2, 1))
    options = {"cls_layer": 2, "local_layer": 1, "window": 2}
    with prune(model, {0: 0.4}, method="vscan", budget=budget, **options) as pruning:
        logits = model(**inputs).logits
    assert pruning.stats.method_options["local_layer"] == 1
    _, embeds, _ = watched(model, lambda: model(**inputs))
    visual, keep = visual_tokens(inputs), inputs["attention_mask"].bool()
    maps, start = [], 0
    for row, inside in enumerate(rows):
        places, offset = visual[row].nonzero().flatten(), 0
        grids = [(1, picture.height, picture.width) for picture in inside]
        maps.append({})
        for unit in [[grid] for grid in grids] if budget == "per_image" else [grids] if grids else []:
            here, there = slice(start, start + cells(unit)), places[offset : offset + cells(unit)]
            kept, merged = reference(deep[here], shallow[here], embeds[row, there], 0.4, grids=unit, side=2)
            keep[row, there] = torch.isin(torch.arange(len(there)), torch.tensor(kept))
            maps[-1] |= {offset + t: {offset + s: w for s, w in of.items()} for t, of in merged.items()}
            assert torch.allclose(pruning.scores[row, there], deep[here], atol=1e-5)
            start, offset = start + cells(unit), offset + cells(unit)
    assert torch.equal(pruning.keep_mask, keep)
    matrix = matrix_of_reference(maps, int(visual.sum(dim=1).max()))

    def with_means(kwargs):
        given = kwargs["inputs_embeds"].clone()
        for row in range(len(maps)):
            places = visual[row].nonzero().flatten()
            given[row, places] = matrix[row, : len(places), : len(places)] @ embeds[row, places]
        return given

    none = torch.empty(len(rows), 0, dtype=torch.int64)
    expected = expected_logits(model, inputs, keep, Merge(none, none, none.float()), embed=with_means)
    assert (logits - expected)[keep].abs().max() < TOLERANCE


@pytest.fixture(scope="module")
def four_layers():
    return qwen_vl(layers=4, attention="eager")


@torch.no_grad()
def test_stage_two_keeps_what_the_last_token_attends_to_in_the_layer_after_the_middle(four_layers):
    inputs = qwen_batch(*RAGGED)
    visual = visual_tokens(inputs)
    with prune(four_layers, {0: 0.6}, method="vscan") as pruning:
        # the kept tokens stand at the end of packed rows
        attention = four_layers(**inputs, output_attentions=True).attentions[2][:, :, -1].mean(dim=1)
    first = pruning.keep_mask
    with prune(four_layers, 0.2, method="vscan") as pruning:
        four_layers(**inputs)
    assert pruning.stats.samples[0].visual_tokens_by_layer == (11, 11, 3, 3)
    for row in range(len(visual)):
        if visual[row].any():
            of_row = torch.zeros(visual.shape[1])
            of_row[first[row]] = attention[row, -int(first[row].sum()) :]
            count = kept_count(0.2, int(visual[row].sum()))
            left = first[row] & visual[row]
            (expected,) = pyramiddrop_stages([of_row], left, [count / int(left.sum())])
            assert torch.equal(pruning.keep_mask[row] & visual[row], expected)
            assert torch.allclose(pruning.scores[row, expected], of_row[expected], atol=1e-6)


@pytest.mark.parametrize("mode", [*MODES, *ONE_ROW])
@torch.no_grad()
def test_dropping_equals_hiding_in_every_way_to_generate(four_layers, mode):
    inputs = qwen_batch(*(RAGGED if mode in MODES else RAGGED[:1]))
    options = {**MODES, **ONE_ROW}[mode]
    if mode == "assisted":
        options = {"assistant_model": qwen_vl(layers=2, seed=1)}
    dropped, hidden, _ = both(
        four_layers, 0.2, lambda: four_layers.generate(**inputs, **{**GREEDY, **options}), method="vscan"
    )
    assert torch.equal(dropped, hidden)


# a CLS token, M-RoPE and windows, features of deeper layers, newlines between tiles, interpolated embeddings
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("budget", ["shared", "per_image"])
@torch.no_grad()
def test_families_drop_as_they_hide(name, budget):
    model, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
    dropped, hidden, pruning = both(model, 0.3, lambda: model(**inputs).logits, method="vscan", budget=budget)
    assert (dropped - hidden)[pruning.keep_mask].abs().max() < TOLERANCE
    before, after = pruning.stats.stages
    assert (before.layer, before.keep, after.keep) == (0, pytest.approx(0.9), 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_keeps_the_budgets(dtype):
    model = qwen_vl(layers=4, dtype=dtype)
    with prune(model, 0.2, method="vscan", budget="per_image") as pruning:
        said = model.generate(**qwen_batch(*RAGGED, dtype=dtype), **GREEDY)
    assert [sample.budget_per_image for sample in pruning.stats.samples] == [[1, 2], [2], [], [4, 1]]
    assert said.shape[1] > qwen_batch(*RAGGED)["input_ids"].shape[1]


def test_its_stages_are_those_of_the_paper():
    assert VScan().stages(0.1, 32) == pytest.approx({0: 0.3, 16: 0.1})
    assert VScan().stages(1 / 18, 28) == pytest.approx({0: 1 / 6, 14: 1 / 18})
    # 64 tokens on average over the layers
    assert VScan().stages(32, 32) == {0: 96, 16: 32}
    assert VScan(second=0.5, layer=4).stages(0.2, 32) == {0: 0.4, 4: 0.2}
    assert VScan(second=1).stages(0.2, 32) == {0: 0.2}
    # stage one would keep everything
    assert VScan().stages(0.5, 3) == {1: 0.5}
    assert VScan().stages(10**400, 2) == {0: 3 * 10**400, 1: 10**400}


@pytest.mark.parametrize(("depth", "name", "layer"), [(24, "llava", 6), (32, "qwen2_5_vl", 8), (2, "qwen2_5_vl", 1)])
def test_the_local_scan_reads_a_quarter_of_the_encoder_by_default(depth, name, layer):
    model = tiny_model(name).base_model
    layers = model.vision_tower.encoder.layers if name == "llava" else model.visual.blocks
    layers.extend([layers[0]] * (depth - len(layers)))
    assert ENCODERS[name](model).default_local_layer == layer


@torch.no_grad()
def test_stages_may_be_named_and_stand_beside_others(four_layers):
    inputs = qwen_batch(*RAGGED)
    kept = {}
    for key, (stages, method) in {
        "both": ({0: 0.6, 3: 0.2}, "vscan"),
        "second alone": ({3: 0.2}, "vscan"),
        "pyramiddrop": ({3: 0.2}, "pyramiddrop"),
        "after another": ({0: ("hawk", 0.6), 3: ("vscan", 0.2)}, "random"),
        "an object": ({0: (VScan(window=1), 0.6), 3: (VScan(), 0.2)}, "random"),
    }.items():
        weights = {"head_weights": "uniform"} if key == "after another" else {}
        with prune(four_layers, stages, method=method, **weights) as pruning:
            four_layers(**inputs)
        assert pruning.stats.samples[0].visual_tokens_by_layer[-1] == 3
        kept[key] = pruning.keep_mask
    assert torch.equal(kept["second alone"], kept["pyramiddrop"])
    assert pruning.stats.method == "vscan"
    with pytest.raises(TypeError, match="options 'second' came beside stages, which say the same; leave them out"):
        prune(four_layers, {0: 0.6, 3: 0.2}, method="vscan", second=0.3)


def test_families_whose_encoder_cannot_be_read_are_refused_by_name():
    with pytest.raises(TypeError, match="leaves the vision encoder of fast_vlm alone, got 'vscan', which reads its at"):
        prune(tiny_model("fast_vlm"), 0.3, method="vscan")


def test_stage_two_is_refused_where_queries_and_keys_rotate_otherwise():
    with pytest.raises(TypeError, match="rotary position embeddings of llama4, got 'vscan'"):
        prune(model_of("llama4"), {1: 0.3}, method="vscan")


def test_a_model_of_one_layer_has_no_middle():
    with pytest.raises(ValueError, match=r"second: expected 1 for a text model of 1 layer, got 0.33.*; pass second=1"):
        prune(qwen_vl(layers=1), 0.3, method="vscan")
    prune(qwen_vl(layers=1), 0.3, method="vscan", second=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"second": 0}, ValueError, "second: expected a number in (0, 1], the share that stays, got 0.0; the paper"),
        ({"second": 1.5}, ValueError, "second: expected a number in (0, 1], the share that stays, got 1.5"),
        ({"second": True}, TypeError, "second: expected a number in (0, 1], the share that stays, got bool"),
        ({"layer": 0}, ValueError, "layer: expected the last layer that reads what stage two drops, counted from 1"),
        ({"layer": 1.0}, TypeError, "got float; the paper takes the middle one, as None does"),
        ({"local": 1.0}, ValueError, "local: expected a float in [0, 1), a share of the budget, got 1.0"),
        ({"window": 0}, ValueError, "window: expected an int >= 1 or None, got 0; the release takes 6 and 4"),
        ({"allocation": "even"}, ValueError, "allocation: expected 'paper' or 'release', got 'even'; the paper's is"),
        ({"local_layer": 0}, ValueError, "local_layer: expected a layer of the vision encoder, counted from 1"),
        ({"cls_layer": "last"}, TypeError, "cls_layer: expected a layer of the vision encoder"),
        ({"rounding": "up"}, ValueError, "rounding: expected 'floor'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        resolve_method("vscan", options)


def test_a_layer_that_the_encoder_lacks_is_refused():
    with pytest.raises(ValueError, match="local_layer: expected 1 to 2, the layers of the vision encoder, got 9; None"):
        prune(qwen_vl(layers=3), 0.3, method="vscan", local_layer=9)


def test_the_attention_of_a_shallow_layer_must_be_declared():
    class Shallow(VScan):
        """Asks for attention that it has not declared."""

        uses_local_attention = False

    model = qwen_vl(layers=3)
    refused = pytest.raises(ValueError, match="cannot read local_attention in a method that does not declare it; set")
    with torch.no_grad(), prune(model, {0: 0.3}, method=Shallow()), refused:
        model(**qwen_batch(*RAGGED))
