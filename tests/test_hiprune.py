"""HiPrune in a model: the encoder's attention against eager weights, the choice against the reference, and the logits
of removing tokens against those of hiding them."""

import pytest
import torch

import csrc_ref
from hawk_kernels import prune
from hawk_kernels.hf.encoders.packed import PackedEncoder
from hawk_kernels.hf.encoders.recorder import VisionRecorder
from hawk_kernels.methods import HiPrune
from tests.encoder_oracles import eager_columns
from tests.tiny_families import tiny_model
from tests.tiny_models import (
    BEGIN,
    END_OF_TURN,
    IMAGE,
    VIDEO,
    VISION_END,
    VISION_START,
    Picture,
    hide,
    question,
    qwen_batch,
    qwen_vl,
    words,
)

TOLERANCE = 1e-4
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [VISION_START, VISION_END, IMAGE, VIDEO]}

PROMPTS = {
    "one image": [[question(Picture(5, 4))], [[(5, 4)]]],
    "left-padded, different sizes": [
        [question(Picture(5, 4)), question(Picture(2, 3), seed=3, after=2)],
        [[(5, 4)], [(2, 3)]],
    ],
    "several images in a row": [
        [question([Picture(3, 3), Picture(2, 4), Picture(1, 2)]), question(Picture(4, 3), seed=5)],
        [[(3, 3), (2, 4), (1, 2)], [(4, 3)]],
    ],
    "text row beside image rows": [
        [question(Picture(4, 4)), [BEGIN, *words(9), END_OF_TURN], question(Picture(2, 2))],
        [[(4, 4)], [], [(2, 2)]],
    ],
    "video before image and image before video": [
        [question([Picture(3, 2, frames=3), Picture(3, 3)]), question([Picture(2, 2), Picture(2, 3, frames=2)], 2)],
        [[(3, 3, 2), (3, 3)], [(2, 2), (2, 2, 3)]],
    ],
}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def model(request):
    return qwen_vl(request.param)


@pytest.mark.parametrize("layers", [(1, 2), (2, 2)], ids=str)
def test_attention_equals_that_of_eager_weights(model, layers):
    """Several images, windows that end early, window order found from the features themselves."""
    vision = model.model.visual
    recorder = VisionRecorder(PackedEncoder(model.model), layers[0])
    pictures = [Picture(5, 3), Picture(2, 2), Picture(1, 5)]
    inputs = qwen_batch(question(pictures))
    in_window_order = []
    handles = [*recorder.attach(), vision.merger.register_forward_hook(lambda m, a, out: in_window_order.append(out))]
    with torch.no_grad(), eager_columns(vision) as received:
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    for handle in handles:
        handle.remove()
    run = recorder.recordings({})["image"]
    assert [piece.grid for piece in run.pieces] == [(1, 5, 3), (1, 2, 2), (1, 1, 5)]
    place = torch.cdist(torch.cat(list(features.pooler_output)), in_window_order[0]).argmin(dim=1)
    for got, layer in zip((run.values["object"], run.values["deep"]), layers, strict=True):
        of_patches = torch.cat([part[0] for part in received[vision.blocks[layer - 1].attn]])
        expected = of_patches.view(-1, 4).mean(dim=1)[place]
        assert (got - expected).abs().max() < 1e-5
        assert got.mean().item() == pytest.approx(1.0, abs=1e-5)


def hooks_left(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def check_choice(recordings, inputs, grids, pruning, r, alpha):
    """Each row, from its own attention, is the literal choice."""
    kept, scores = pruning.keep_mask, pruning.scores
    visual = inputs["mm_token_type_ids"] > 0
    for row, images in enumerate(grids):
        if not images:
            assert (scores[row] == -torch.inf).all()
            continue
        of_object, of_deep = (torch.cat(parts) for parts in zip(*(recordings[row, i] for i in range(len(images)))))
        expected = csrc_ref.hiprune_select(of_object, of_deep, r, grid=images, alpha=alpha)
        assert torch.equal(kept[row, visual[row]], expected.mask)
        assert torch.allclose(scores[row, visual[row]], of_deep)


def attention_by_image(model, rows):
    """Object and deep attention of each picture of each row, each encoded alone."""
    inputs = qwen_batch(*rows)
    recorder = VisionRecorder(PackedEncoder(model.model), None)
    handles = recorder.attach()
    found, taken = {}, {False: 0, True: 0}
    for row, items in enumerate(rows):
        for i, picture in enumerate(item for item in items if isinstance(item, Picture)):
            is_video, patches = picture.frames > 1, picture.tokens * 4
            start = taken[is_video]
            pixels = inputs["pixel_values_videos" if is_video else "pixel_values"][start : start + patches]
            taken[is_video] += patches
            grid = torch.tensor([[picture.frames, picture.height * 2, picture.width * 2]])
            kind = "video" if is_video else "image"
            with torch.no_grad():
                getattr(model.model, f"get_{kind}_features")(pixels, grid, return_dict=True)
            run = recorder.recordings({})[kind]
            found[row, i] = (run.values["object"], run.values["deep"])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("rows", "grids"), PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("options", [{}, {"alpha": 2.0}], ids=["default", "many anchors"])
def test_the_choice_is_the_literal_one_and_removing_equals_hiding(model, rows, grids, options):
    inputs = qwen_batch(*rows)
    recordings = attention_by_image(model, rows)
    for keep_ratio in (0.3, 0.6):
        with torch.no_grad():
            with prune(model, keep_ratio, method="hiprune", **options) as pruning:
                pruned = model(**inputs).logits
            hidden = model(**hide(model, inputs, pruning.keep_mask)).logits
        check_choice(recordings, inputs, grids, pruning, keep_ratio, options.get("alpha", 0.1))
        assert (pruned - hidden)[pruning.keep_mask].abs().max() < TOLERANCE
    assert hooks_left(model) == 0


@pytest.mark.parametrize(("rows", "grids"), PROMPTS.values(), ids=PROMPTS.keys())
def test_generate_which_encodes_before_it_reads(model, rows, grids):
    """The same tokens as in `model(...)`; the features that generate hands over carry what was measured."""
    inputs = qwen_batch(*rows)
    with prune(model, 0.4, method="hiprune", alpha=1.0) as pruning:
        with torch.no_grad():
            model(**inputs)
        from_forward = pruning.keep_mask
        pruned = model.generate(**inputs, **GREEDY)
    assert torch.equal(pruning.keep_mask, from_forward)
    assert torch.equal(pruned, model.generate(**hide(model, inputs, pruning.keep_mask), **GREEDY))


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["beams", "return sequences", "no cache"],
)
def test_copies_of_a_sample_share_its_attention(model, options):
    rows, grids = PROMPTS["several images in a row"]
    inputs = qwen_batch(*rows)
    recordings = attention_by_image(model, rows)
    copies = options.get("num_beams", options.get("num_return_sequences", 1))
    with prune(model, 0.4, method="hiprune", alpha=1.0) as pruning:
        torch.manual_seed(1)
        pruned = model.generate(**inputs, **{**GREEDY, **options})
    torch.manual_seed(1)
    hidden = model.generate(**hide(model, inputs, pruning.keep_mask), **{**GREEDY, **options})
    assert torch.equal(pruned, hidden)
    repeated = {name: v.repeat_interleave(copies, 0) for name, v in inputs.items() if name == "mm_token_type_ids"}
    recordings = {(row * copies + c, i): v for (row, i), v in recordings.items() for c in range(copies)}
    check_choice(recordings, repeated, [g for g in grids for _ in range(copies)], pruning, 0.4, 1.0)


def test_each_image_has_its_budget(model):
    rows, grids = PROMPTS["video before image and image before video"]
    inputs = qwen_batch(*rows)
    recordings = attention_by_image(model, rows)
    with prune(model, 0.5, method="hiprune", alpha=1.5, budget="per_image") as pruning, torch.no_grad():
        model(**inputs)
    visual = inputs["mm_token_type_ids"] > 0
    for row, images in enumerate(grids):
        expected = [
            csrc_ref.hiprune_select(*recordings[row, i], 0.5, grid=image, alpha=1.5).mask
            for i, image in enumerate(images)
        ]
        assert torch.equal(pruning.keep_mask[row, visual[row]], torch.cat(expected))


def test_keeping_everything_is_token_identical(model):
    inputs = qwen_batch(*PROMPTS["left-padded, different sizes"][0])
    whole = model.generate(**inputs, **GREEDY)
    with prune(model, 1.0, method="hiprune"):
        assert torch.equal(model.generate(**inputs, **GREEDY), whole)


def test_the_object_layer_is_chosen_and_said():
    model = qwen_vl(seed=4)
    inputs = qwen_batch(question(Picture(6, 6)))
    kept = {}
    for layer in (None, 1, 2):
        with prune(model, 0.3, method="hiprune", alpha=3.0, object_layer=layer) as pruning, torch.no_grad():
            model(**inputs)
        kept[layer] = pruning.keep_mask
        assert pruning.stats.to_dict()["method_options"] == {
            "alpha": 3.0,
            "object_layer": layer or 1,
            "object_layer_source": "the option object_layer" if layer else "0.5 of 2 layers",
            "rounding": "floor",
            "deep_layer": 2,
        }
    assert torch.equal(kept[None], kept[1])
    assert not torch.equal(kept[1], kept[2])


def test_a_method_object_and_half_precision():
    model = qwen_vl(dtype=torch.bfloat16)
    inputs = qwen_batch(question(Picture(4, 4)), dtype=torch.bfloat16)
    with prune(model, 5, method=HiPrune(alpha=0.5, rounding="ceil")) as pruning, torch.no_grad():
        model(**inputs)
    assert pruning.keep_mask.sum() == inputs["attention_mask"].sum() - 16 + 5
    assert pruning.scores.dtype == torch.float32


def test_features_from_outside_the_block_are_refused():
    model = qwen_vl()
    inputs = qwen_batch(question(Picture(4, 4)))
    pixels, grid = inputs.pop("pixel_values"), inputs["image_grid_thw"]

    def encoded():
        return {"mm_encoder_outputs": {"image": model.model.get_image_features(pixels, grid, return_dict=True)}}

    outside = encoded()
    with prune(model, 0.5, method="hiprune", object_layer=2), torch.no_grad():
        with pytest.raises(ValueError, match="mm_encoder_outputs: expected image features that the vision encoder"):
            model(**inputs, **outside)
        elsewhere = encoded()
        model(**inputs, **elsewhere)
    with (
        prune(model, 0.5, method="hiprune", object_layer=1),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"measured in layers \(1, 2\) of the vision encoder, got \(2, 2\); encode"),
    ):
        model(**inputs, **elsewhere)


def test_placeholders_without_their_image_are_refused():
    model = qwen_vl()
    inputs = qwen_batch(question(Picture(4, 4)))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with (
        prune(model, 0.5, method="hiprune"),
        torch.no_grad(),
        pytest.raises(
            ValueError, match=r"input_ids: expected image placeholders of row 0 to match the grids .* for none"
        ),
    ):
        model(**text)


def test_a_family_whose_encoder_cannot_be_read_is_refused():
    with pytest.raises(
        TypeError, match=r"vision encoder of llama4 alone, got 'hiprune', .*; that method works for .*qwen2_5_vl"
    ):
        prune(tiny_model("llama4"), 0.5, method="hiprune")


def test_a_method_that_did_not_ask_gets_no_encoder_attention():
    class Undeclared(HiPrune):
        uses_encoder_attention = False

    model, inputs = qwen_vl(), qwen_batch(question(Picture(4, 4)))
    with (
        prune(model, 0.5, method=Undeclared()),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"cannot read encoder_attention .* set uses_encoder_attention = True"),
    ):
        model(**inputs)


BAD_OPTIONS = {
    "alpha": (dict(alpha=-1), ValueError, r"alpha: expected a number in \[0, 5\], .*, got -1; the paper"),
    "alpha type": (dict(alpha=None), TypeError, "alpha: expected a number .*, got NoneType"),
    "layer 0": (dict(object_layer=0), ValueError, "object_layer: expected a layer .*, counted from 1, .*, got 0"),
    "layer type": (dict(object_layer=1.0), TypeError, "object_layer: expected a layer .*, got float"),
    "layer too deep": (dict(object_layer=3), ValueError, "object_layer: expected 1 to 2, .* got 3; None takes layer 1"),
    "rounding": (dict(rounding="up"), ValueError, "rounding: expected 'floor'"),
    "another's option": (
        dict(normalize="l2"),
        TypeError,
        "method 'hiprune' has no option 'normalize'; its options are",
    ),
    "head weights": (dict(head_weights="uniform"), TypeError, "head_weights: method 'hiprune' uses none"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options_say_what_to_do(name):
    options, error, message = BAD_OPTIONS[name]
    with pytest.raises(error, match=message):
        prune(qwen_vl(), 0.5, method="hiprune", **options)
