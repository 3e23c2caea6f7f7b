"""HiPrune in every family whose vision encoder can be read.

What the encoder attends to is compared with eager weights, where it lands among the visual tokens with nudges of the
encoder's own tokens, the choice with the literal reference, and logits of removing tokens with those of hiding them.
"""

import inspect
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationMixin

import csrc_ref
from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.encoders.pieces import Piece, num_cells, num_tokens
from hawk_kernels.hf.encoders.recorder import VisionRecorder
from hawk_kernels.hf.encoders.tiles import TileEncoder
from hawk_kernels.hf.families import ENCODERS, FAMILIES
from hawk_kernels.hf.hooks import WatchedMethod
from tests.encoder_oracles import eager_columns, influence
from tests.tiny_families import BY_NAME, TEXT, batch, tiny_model
from tests.tiny_models import (
    BEGIN,
    END_OF_TURN,
    FIRST_WORD,
    IMAGE,
    VIDEO,
    VOCABULARY,
    Picture,
    question,
    sharpen,
    words,
)

TOLERANCE = 1e-4
GREEDY = {
    "do_sample": False,
    "max_new_tokens": 4,
    "suppress_tokens": list(range(FIRST_WORD)),
    "eos_token_id": VOCABULARY + 1,
}


def pictures(name):
    return [BY_NAME[name].picture or size for size in (Picture(3, 3), Picture(2, 3))]


def prompts(name):
    one, other = pictures(name)
    found = {
        "padded batch": [question([one, other]), question(other, seed=3, after=2)],
        "text row": [question(one), [BEGIN, *words(7), END_OF_TURN]],
    }
    if BY_NAME[name].video:
        film = question(Picture(2, 3, frames=6))
        # where frames are marked as images a batch has the one or the other
        found["video"] = [film] if BY_NAME[name].video_token == IMAGE else [film, question(one, seed=2, after=3)]
    return found


KINDS = [(name, kind) for name in ENCODERS for kind in ("image", "video") if kind == "image" or BY_NAME[name].video]
PROMPTS = [(name, prompt) for name in ENCODERS for prompt in prompts(name)]


@lru_cache(maxsize=1)
def model_of(name):
    return tiny_model(name)


def encode(multimodal, kind, inputs):
    """Features `[visual tokens, hidden]` of the images or videos among model inputs."""
    method = getattr(multimodal, f"get_{kind}_features")
    if kind == "video" and "pixel_values" in inspect.signature(method).parameters:
        # transformers 5.5 names them so
        inputs = {**inputs, "pixel_values": inputs["pixel_values_videos"]}
    arguments = {name: inputs[name] for name in inspect.signature(method).parameters if name in inputs}
    images = list(method(**arguments, return_dict=True).pooler_output)
    return torch.cat([image.reshape(-1, image.shape[-1]) for image in images])


def recorded(multimodal, encoder, kinds, inputs):
    """One run of the encoder for each kind, and what it was asked for."""
    recorder = VisionRecorder(encoder, None)
    handles = recorder.attach()
    with torch.no_grad():
        features = {kind: encode(multimodal, kind, inputs) for kind in kinds}
    for handle in handles:
        handle.remove()
    return recorder, recorder.recordings({}), features


@pytest.mark.parametrize(("name", "kind"), KINDS, ids=lambda value: value)
def test_attention_is_that_of_eager_weights_where_the_encoder_tokens_went(name, kind):
    model = model_of(name)
    multimodal = model.base_model
    encoder = ENCODERS[name](multimodal)
    inputs = batch(name, question(pictures(name) if kind == "image" else Picture(2, 3, frames=6)))
    recorder, runs, features = recorded(multimodal, encoder, [kind], inputs)
    run = runs[kind]
    with torch.no_grad(), eager_columns(encoder.tower) as received:
        encode(multimodal, kind, inputs)
    of_layers = [
        torch.cat([part.flatten() for part in received[encoder.attentions[layer - 1]]]) for layer in recorder.layers
    ]

    deep = encoder.attentions[encoder.deep_layer - 1]
    layer = next(module for module in encoder.tower.modules() if deep in module.children())
    made_of = influence(layer, lambda: encode(multimodal, kind, inputs), len(of_layers[0]))
    is_separator = torch.cat([torch.from_numpy(piece.is_separator) for piece in run.pieces])
    if len(features[kind]) < len(is_separator):
        pytest.skip("this transformers appends the newline of a video outside")
    assert torch.equal(is_separator, ~made_of.any(dim=1))
    assert len(features[kind]) == num_tokens(run.pieces) == num_cells(run.pieces) + is_separator.sum()
    share = made_of[~is_separator].float()
    share /= share.sum(dim=1, keepdim=True)
    for got, expected in zip((run.values["object"], run.values["deep"]), of_layers, strict=True):
        assert (got - share @ expected).abs().max() < 1e-5


@torch.no_grad()
def hidden_logits(model, inputs, keep_mask):
    """Logits of the whole prompt where tokens are masked out instead of removed."""
    seen = []

    def look(module, args, kwargs):
        positions = kwargs.get("position_ids")
        seen.append(torch.arange(inputs["input_ids"].shape[1])[None] if positions is None else positions)

    handle = dissect(model).text.register_forward_pre_hook(look, with_kwargs=True)
    model(**inputs)
    handle.remove()
    return model(**{**inputs, "attention_mask": keep_mask.long(), "position_ids": seen[0]}).logits


def expected_choice(runs, inputs, r, alpha):
    """Kept tokens and scores `[B, T]` by the literal reference, the images of a batch taken in their order."""
    ids = inputs["input_ids"]
    keep, scores = inputs["attention_mask"].bool(), torch.full(ids.shape, -torch.inf)
    left = {kind: list(run.pieces) for kind, run in runs.items()}
    taken = dict.fromkeys(runs, 0)
    for row in range(len(ids)):
        cells, of_object, of_deep, grids = [], [], [], []
        position = 0
        while position < ids.shape[1]:
            kind = {IMAGE: "image", VIDEO: "video"}.get(int(ids[row, position]))
            if kind is None:
                position += 1
                continue
            kind = kind if kind in runs else next(iter(runs))
            piece = left[kind].pop(0)
            places = position + (~torch.from_numpy(piece.is_separator)).nonzero().flatten()
            cells.append(places)
            here = slice(taken[kind], taken[kind] + len(places))
            of_object.append(runs[kind].values["object"][here])
            of_deep.append(runs[kind].values["deep"][here])
            taken[kind] += len(places)
            grids += [] if piece.grid is None else [piece.grid]
            position += len(piece.is_separator)
        if cells:
            where = torch.cat(cells)
            deep = torch.cat(of_deep)
            chosen = csrc_ref.hiprune_select(torch.cat(of_object), deep, r, grid=grids, alpha=alpha)
            keep[row, where], scores[row, where] = chosen.mask, deep
    assert all(not pieces for pieces in left.values())
    return keep, scores


@pytest.mark.parametrize(("name", "prompt"), PROMPTS, ids=lambda value: value)
def test_the_choice_is_the_literal_one_and_removing_equals_hiding(name, prompt):
    model, inputs = model_of(name), batch(name, *prompts(name)[prompt])
    multimodal = model.base_model
    kinds = [kind for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")) if pixels in inputs]
    _, runs, _ = recorded(multimodal, ENCODERS[name](multimodal), kinds, inputs)
    with torch.no_grad(), prune(model, 0.4, method="hiprune", alpha=1.5) as pruning:
        pruned = model(**inputs).logits
        said = model.generate(**inputs, **GREEDY)
    keep, scores = expected_choice(runs, inputs, 0.4, 1.5)
    assert torch.equal(pruning.keep_mask, keep)
    assert torch.allclose(pruning.scores, scores)
    visual = (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
    assert [sample.visual_tokens_after for sample in pruning.stats.samples] == (keep & visual).sum(dim=1).tolist()
    assert (keep & visual).sum() < visual.sum()
    if BY_NAME[name].hides:
        assert (pruned - hidden_logits(model, inputs, keep))[keep].abs().max() < TOLERANCE
    assert torch.equal(said[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


@pytest.mark.parametrize("name", ENCODERS)
def test_leaving_the_block_leaves_no_trace(name):
    model, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])

    def traces():
        return [
            (dict(module._forward_pre_hooks), dict(module._forward_hooks), sorted(vars(module)))
            for module in model.modules()
        ]

    with torch.no_grad():
        whole = model.generate(**inputs, **GREEDY)
        before = traces()
        with prune(model, 1.0, method="hiprune"):
            assert torch.equal(model.generate(**inputs, **GREEDY), whole)
        with pytest.raises(RuntimeError, match="on purpose"), prune(model, 0.5, method="hiprune"):
            raise RuntimeError("on purpose")
        assert traces() == before


def test_only_two_layers_are_watched():
    model = tiny_model("internvl")
    recorder = VisionRecorder(ENCODERS["internvl"](model.base_model), None)
    handles = recorder.attach()
    watched = {name.rsplit(".", 1)[0] for name, module in model.named_modules() if module._forward_hooks}
    for handle in handles:
        handle.remove()
    layers = {name.split("layer.")[1].split(".")[0] for name in watched}
    assert len(recorder.layers) == 2
    assert layers == {str(layer - 1) for layer in recorder.layers}


# older releases repeat the images of a row one by one, and so give the copies images of each other
@pytest.mark.skipif(
    not hasattr(GenerationMixin, "_expand_multimodal_outputs"), reason="this transformers mixes up images"
)
@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "llava_onevision", "internvl", "gemma3", "idefics3", "qwen3_vl"]
)
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False}],
    ids=["beams", "return sequences", "no cache"],
)
def test_copies_of_a_sample_share_its_attention(name, options):
    model, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
    with torch.no_grad(), prune(model, 0.4, method="hiprune", alpha=1.5) as pruning:
        model(**inputs)
        alone = pruning.keep_mask
        model.generate(**inputs, **{**GREEDY, **options})
    copies = len(pruning.keep_mask) // len(alone)
    length = alone.shape[1]
    assert torch.equal(pruning.keep_mask[:, :length], alone.repeat_interleave(copies, 0))


def test_each_image_has_its_budget_and_its_newlines():
    model, inputs = model_of("llava_next"), batch("llava_next", *prompts("llava_next")["padded batch"])
    with torch.no_grad(), prune(model, 3, method="hiprune", budget="per_image") as pruning:
        model(**inputs)
    # two newlines after the two rows of tiles of each
    assert [sample.budget_per_image for sample in pruning.stats.samples] == [[5, 5], [5]]
    scored = pruning.scores > -torch.inf
    visual = inputs["input_ids"] == IMAGE
    assert (pruning.keep_mask & scored).sum(dim=1).tolist() == [6, 3]
    assert (visual & ~scored).sum(dim=1).tolist() == [4, 2]
    assert pruning.keep_mask[visual & ~scored].all()


def test_tiles_that_stand_side_by_side_are_one_image_of_several_grids():
    """An InternVL image is a run of placeholders for all of its tiles; neighbours end with the tile."""
    model = model_of("internvl")
    ids = torch.tensor([[BEGIN, *[IMAGE] * 27, *words(4), END_OF_TURN, *words(2), *[IMAGE] * 9, *words(2)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(4, 3, 24, 24)}
    _, runs, _ = recorded(model.model, ENCODERS["internvl"](model.model), ["image"], inputs)
    with torch.no_grad(), prune(model, 0.4, method="hiprune", alpha=2.0) as pruning:
        model(**inputs)
    keep, _ = expected_choice(runs, inputs, 0.4, 2.0)
    assert torch.equal(pruning.keep_mask, keep)
    with torch.no_grad(), prune(model, 5, method="hiprune", budget="per_image") as pruning:
        model(**inputs)
    assert pruning.stats.samples[0].budget_per_image == [5, 5]


def text(model_type="llama"):
    return {"model_type": model_type, **TEXT}


def vision(model_type, image_size, patch_size, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"model_type": model_type, **sizes, "image_size": image_size, "patch_size": patch_size, **changes}


ANY_RESOLUTION = {
    "vision_config": vision("siglip_vision_model", 16, 4, vision_use_head=False),
    "image_grid_pinpoints": [[16, 16], [16, 32], [32, 16], [32, 32], [16, 48]],
    "image_token_index": IMAGE,
}


@lru_cache(maxsize=2)
def any_resolution_model(name):
    from transformers import AutoConfig, AutoModelForImageTextToText

    more = {
        "llava_next": {"vision_feature_select_strategy": "full", "text_config": text()},
        "llava_onevision": {"vision_aspect_ratio": "anyres_max_2", "text_config": text(model_type="qwen2")},
    }
    config = AutoConfig.for_model(name, tie_word_embeddings=False, **ANY_RESOLUTION, **more[name])
    return sharpen(AutoModelForImageTextToText.from_config(config), 0)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["llava_next", "llava_onevision"]),
    sizes=st.lists(st.tuples(st.integers(5, 70), st.integers(5, 70)), min_size=1, max_size=3),
    cut=st.booleans(),
)
def test_tiles_padding_and_newlines_of_pictures_of_any_size(name, sizes, cut):
    """The encoder's statistics take the way of its features through the model itself, interpolation included."""
    model = any_resolution_model(name)
    multimodal = model.base_model
    encoder = ENCODERS[name](multimodal)
    inputs = {"pixel_values": torch.randn(len(sizes), 5, 3, 16, 16), "image_sizes": torch.tensor(sizes)}
    if name == "llava_onevision" and not cut:
        inputs["batch_num_images"] = torch.tensor([len(sizes)])
    _, runs, _ = recorded(multimodal, encoder, ["image"], inputs)
    run = runs["image"]

    statistic = {}
    recorder = VisionRecorder(encoder, None)
    handles = recorder.attach()
    through = encoder.tower.register_forward_hook(
        lambda module, args, output: carry(output, recorder._thread.received["deep"][0])
    )
    unprojected = multimodal.multi_modal_projector.forward
    multimodal.multi_modal_projector.forward = lambda x: x
    newline = multimodal.image_newline.data.clone()
    multimodal.image_newline.data = torch.full((32,), torch.nan)
    with torch.no_grad():
        statistic = encode(multimodal, "image", inputs)[:, 0]
    multimodal.multi_modal_projector.forward = unprojected
    multimodal.image_newline.data = newline
    through.remove()
    for handle in handles:
        handle.remove()

    is_separator = torch.cat([torch.from_numpy(piece.is_separator) for piece in run.pieces])
    assert torch.equal(is_separator, statistic.isnan())
    assert torch.allclose(run.values["deep"], statistic[~is_separator], atol=1e-6)
    # a newline ends every row
    for piece in run.pieces:
        if piece.grid is not None and piece.is_separator.any():
            _, rows, columns = piece.grid
            assert piece.is_separator.reshape(rows, columns + 1)[:, -1].all()


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_pictures_of_different_sizes_in_a_batch(name):
    """Whole image, unpadded tiles, newlines: the choice over all grids of a row, and removing equals hiding."""
    model = any_resolution_model(name)
    sizes = torch.tensor([(20, 50), (40, 16), (10, 12)])
    inputs = {"pixel_values": torch.randn(3, 5, 3, 16, 16), "image_sizes": sizes}
    with torch.no_grad():
        images = model.base_model.get_image_features(**inputs, return_dict=True).pooler_output
    first, second, third = ([IMAGE] * len(image) for image in images)
    rows = [
        [BEGIN, *first, *words(2), *second, *words(4), END_OF_TURN, *words(2)],
        [BEGIN, *words(2), *third, *words(3), END_OF_TURN, *words(2)],
    ]
    longest = max(map(len, rows))
    inputs["input_ids"] = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    inputs["attention_mask"] = (torch.arange(longest) >= torch.tensor([[longest - len(row)] for row in rows])).long()
    _, runs, _ = recorded(model.base_model, ENCODERS[name](model.base_model), ["image"], inputs)
    keep, scores = expected_choice(runs, inputs, 0.3, 2.0)
    with torch.no_grad(), prune(model, 0.3, method="hiprune", alpha=2.0) as pruning:
        pruned = model(**inputs).logits
        model.generate(**inputs, **GREEDY)
    assert torch.equal(pruning.keep_mask[:, :longest], keep)
    assert torch.allclose(pruning.scores[:, :longest], scores)
    newlines = (inputs["input_ids"] == IMAGE) & (scores == -torch.inf)
    assert newlines.sum() > 10
    assert keep[newlines].all()
    assert (pruned - hidden_logits(model, inputs, keep))[keep].abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "paligemma"])
def test_attention_is_that_which_transformers_itself_reports(name):
    model = tiny_model(name, attention="eager")
    multimodal = model.base_model
    encoder = ENCODERS[name](multimodal)
    pixels = torch.randn(3, 3, encoder.tower.config.image_size, encoder.tower.config.image_size)
    reported = []
    handles = [
        attention.register_forward_hook(lambda module, args, output: reported.append(output[1]))
        for attention in encoder.attentions
    ]
    with torch.no_grad():
        attentions = encoder.tower(pixels, output_attentions=True).attentions
        assert all(torch.equal(one, other) for one, other in zip(attentions, reported, strict=True))
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    got = {}
    received = encoder.received
    encoder.received = lambda layer, *rest: got.setdefault(layer, received(layer, *rest))
    recorder = VisionRecorder(encoder, None)
    handles = recorder.attach()
    recorder._thread.is_encoding = True
    with torch.no_grad():
        encoder.tower(pixels)
    for handle in handles:
        handle.remove()
    for layer in recorder.layers:
        assert (got[layer] - attentions[layer - 1].mean(dim=1).sum(dim=1)).abs().max() < 1e-5


def test_threads_do_not_mix_their_images():
    model = model_of("llava")
    prompts_of = [batch("llava", question(pictures("llava")), seed=seed) for seed in range(4)]
    with torch.no_grad(), prune(model, 0.4, method="hiprune", alpha=1.5) as pruning:
        expected = []
        for inputs in prompts_of:
            model(**inputs)
            expected.append(pruning.keep_mask)

        def ask(inputs):
            with torch.no_grad():
                for _ in range(5):
                    model(**inputs)
            return pruning.keep_mask

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(ask, prompts_of))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(expected[0], expected[1])


def test_an_encoder_that_runs_by_itself_inside_the_block_is_no_image_of_a_prompt():
    model, inputs = model_of("llava"), batch("llava", question(pictures("llava")))
    with torch.no_grad(), prune(model, 0.4, method="hiprune", alpha=1.5) as pruning:
        model(**inputs)
        before = pruning.keep_mask
        model.model.vision_tower(torch.randn(5, 3, 12, 12))
        model(**inputs)
        features = model.model.get_image_features(inputs["pixel_values"], return_dict=False)
        assert isinstance(features, tuple)
    assert torch.equal(pruning.keep_mask, before)
    assert not pruning._hooks._sources._recorder._thread.received


def carry(output, received):
    """An encoder's output whose hidden states all hold the statistic of their token."""
    hidden = received[..., None].expand(*received.shape, 32)
    output.last_hidden_state = hidden
    output.hidden_states = tuple(hidden for _ in range(3))
    return output


def llava(vision_config, **changes):
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(
        "llava", vision_config=vision_config, text_config=text(), image_token_index=IMAGE, **changes
    )
    return sharpen(AutoModelForImageTextToText.from_config(config), 0)


def test_a_cls_token_that_stays_among_the_visual_tokens_is_no_cell():
    model = llava(vision("clip_vision_model", 12, 4, projection_dim=32), vision_feature_select_strategy="full")
    _, runs, features = recorded(
        model.model, TileEncoder(model.model), ["image"], {"pixel_values": torch.randn(2, 3, 12, 12)}
    )
    assert len(features["image"]) == 20
    assert num_cells(runs["image"].pieces) == 18
    assert [piece.is_separator.tolist() for piece in runs["image"].pieces] == [[True], [False] * 9] * 2


def test_an_encoder_with_rotary_positions_is_refused_and_hawk_still_works():
    model = llava(vision("pixtral", 24, 4, head_dim=16), vision_feature_layer=-1, vision_feature_select_strategy="full")
    with pytest.raises(TypeError, match=r"PixtralVisionModel rotates queries and keys .*; use method='hawk'"):
        prune(model, 0.5, method="hiprune")
    prune(model, 0.5, head_weights="uniform")


def test_tokens_that_are_no_squares_of_patches_are_refused():
    model = llava(vision("clip_vision_model", 12, 4, projection_dim=32))
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: output[:, :5])
    inputs = {"pixel_values": torch.randn(1, 3, 12, 12)}
    with pytest.raises(ValueError, match="squares of the 3 x 3 patches of a tile, got 5 tokens; use method='hawk'"):
        recorded(model.model, TileEncoder(model.model), ["image"], inputs)


DEFAULT_LAYERS = {
    # (encoder, number of layers, layer whose output is taken) -> (object layer, deep layer), source
    "CLIP-L of LLaVA-1.5": ("clip_vision_model", 24, -2, (9, 23), "arXiv 2508.00553"),
    "CLIP of another depth": ("clip_vision_model", 12, -2, (4, 11), "0.375 of 12 layers"),
    "several layers": ("clip_vision_model", 24, [-2, -5, 6], (9, 23), "arXiv 2508.00553"),
    "a layer from the front": ("clip_vision_model", 8, 5, (3, 5), "0.375 of 8 layers"),
    "SigLIP to its end": ("siglip_vision_model", 26, -1, (13, 26), "0.5 of 26 layers"),
}


@pytest.mark.parametrize(
    ("kind", "depth", "taken", "layers", "source"), DEFAULT_LAYERS.values(), ids=DEFAULT_LAYERS.keys()
)
def test_default_layers(kind, depth, taken, layers, source):
    changes = {"num_hidden_layers": depth} | ({"projection_dim": 32} if kind.startswith("clip") else {})
    model = llava(vision(kind, 12, 4, **changes), vision_feature_layer=taken)
    options = prune(model, 0.5, method="hiprune").stats.to_dict()["method_options"]
    assert (options["object_layer"], options["deep_layer"]) == layers
    assert options["object_layer_source"] == source


def test_the_deepest_of_the_layers_that_vipllava_takes():
    from transformers import AutoConfig, AutoModelForImageTextToText

    sizes = vision("clip_vision_model", 12, 4, projection_dim=32, num_hidden_layers=24)
    config = AutoConfig.for_model(
        "vipllava", vision_config=sizes, text_config=text(), vision_feature_layers=[-2, -5, -8, -11, 6]
    )
    model = AutoModelForImageTextToText.from_config(config)
    assert prune(model, 0.5, method="hiprune").stats.method_options["deep_layer"] == 23


def test_the_layer_of_qwen2_5_vl_is_the_published_one():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    sizes = {"depth": 32, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(text_config=text(model_type="qwen2_5_vl_text"), vision_config=sizes)
    options = prune(Qwen2_5_VLForConditionalGeneration(config), 0.5, method="hiprune").stats.method_options
    assert (options["object_layer"], options["deep_layer"]) == (16, 32)
    assert options["object_layer_source"] == "arXiv 2508.00553"


def test_queries_and_keys_are_read_after_their_norms():
    from transformers import AutoConfig, AutoModelForImageTextToText

    sizes = vision("internvl_vision", [24, 24], [4, 4], use_qk_norm=True)
    config = AutoConfig.for_model("internvl", vision_config=sizes, text_config=text(model_type="qwen2"))
    multimodal = sharpen(AutoModelForImageTextToText.from_config(config), 0).model
    encoder = ENCODERS["internvl"](multimodal)
    inputs = {"pixel_values": torch.randn(2, 3, 24, 24)}
    recorder, runs, _ = recorded(multimodal, encoder, ["image"], inputs)
    with torch.no_grad(), eager_columns(encoder.tower) as received:
        encode(multimodal, "image", inputs)
    (of_patches,) = received[encoder.attentions[recorder.layers[1] - 1]]
    expected = of_patches[:, 1:].view(2, 3, 2, 3, 2).mean(dim=(2, 4)).flatten()
    assert (runs["image"].values["deep"] - expected).abs().max() < 1e-5


def test_padding_patches_neither_look_nor_are_looked_at():
    """Idefics3 masks what its processor padded: the rest attends as if it were alone."""
    model = tiny_model("idefics3")
    multimodal = model.base_model
    encoder = ENCODERS["idefics3"](multimodal)
    inputs = {"pixel_values": torch.randn(1, 2, 3, 24, 24), "pixel_attention_mask": torch.ones(1, 2, 24, 24).bool()}
    inputs["pixel_attention_mask"][0, 1, 16:] = False
    recorder, runs, _ = recorded(multimodal, encoder, ["image"], inputs)
    with torch.no_grad(), eager_columns(encoder.tower) as received:
        encode(multimodal, "image", inputs)
    for got, layer in zip((runs["image"].values["object"], runs["image"].values["deep"]), recorder.layers, strict=True):
        (of_patches,) = received[encoder.attentions[layer - 1]]
        expected = of_patches.view(2, 3, 2, 3, 2).mean(dim=(2, 4)).flatten()
        assert torch.allclose(got, expected, atol=1e-5)
    assert (runs["image"].values["deep"][15:] == 0).all()
    assert runs["image"].values["deep"][9:15].mean().item() == pytest.approx(1.0, abs=1e-5)


def test_double_precision_models_are_measured_in_single():
    model, inputs = tiny_model("llava").double(), batch("llava", question(pictures("llava")))
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad(), prune(model, 0.4, method="hiprune") as pruning:
        model(**inputs)
    assert pruning.scores.dtype == torch.float32


def test_every_encoder_belongs_to_a_family():
    assert set(ENCODERS) <= {family.model_type for family in FAMILIES}


class Talker:
    def greet(self, name, loud=False):
        if name is None:
            raise ValueError("nobody")
        return name.upper() if loud else name


def test_a_watched_method_tells_arguments_and_result_and_comes_back():
    from contextlib import contextmanager

    told = []

    @contextmanager
    def watch(arguments):
        told.append(arguments)
        yield told.append

    talker = Talker()
    handle = WatchedMethod(talker, "greet", watch)
    assert list(inspect.signature(talker.greet).parameters) == ["name", "loud"]
    assert talker.greet("ann", loud=True) == "ANN"
    assert told == [{"name": "ann", "loud": True}, "ANN"]
    with pytest.raises(ValueError, match="nobody"):
        talker.greet(None)
    assert told[2:] == [{"name": None}]
    handle.remove()
    assert vars(talker) == {}
    talker.greet = own = lambda name: name
    WatchedMethod(talker, "greet", watch).remove()
    assert talker.greet is own


def test_pieces_count_their_tokens():
    pieces = [Piece.of_cells(2, 3), Piece.of_separators(2)]
    assert (num_tokens(pieces), num_cells(pieces)) == (8, 6)
