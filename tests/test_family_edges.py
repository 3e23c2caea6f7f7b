"""What is particular to some families: windows, scores of the first attention layer, FlashAttention, refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.families import OUT_OF_REACH
from hawk_kernels.hf.packing import splits_at_gaps
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.methods import METHODS
from tests.family_checks import (
    NEW_TOKENS,
    NEWEST,
    SUPPORTED,
    TOLERANCE,
    VERSION,
    example,
    generate,
    lacks_unpruned,
    needs,
    prompts,
    pruned_by,
    removed,
    watched,
)
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import BEGIN, FIRST_WORD, IMAGE, VISION_END, VISION_START, Picture, question, words

families = pytest.mark.parametrize("name", BY_NAME)


WINDOW = 6
# cohere_compass and muse_glimmer have windows too, but their logits take more than the text model and its head.
# Where the text model sees kept tokens alone, windows count these; where masks over pairs are packed, they count all.
SLIDING = {
    "aya_vision": {"sliding_window": WINDOW},
    "cohere2_vision": {"sliding_window": WINDOW},
    "exaone4_5": {"sliding_window": WINDOW},
    "gemma3": {"sliding_window": WINDOW},
    "gemma4": {"sliding_window": WINDOW},
    "gemma4_unified": {"sliding_window": WINDOW},
    "lfm3_vl": {"sliding_window": WINDOW},
    "llama4": {"attention_chunk_size": WINDOW},
    "paligemma": {
        "model_type": "gemma2",
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 16,
    },
}


@pytest.mark.parametrize(("name", "changes"), SLIDING.items(), ids=SLIDING)
@torch.no_grad()
def test_windows_shorter_than_the_prompt(name, changes):
    needs(name)
    # PaliGemma 2 caps its attention, which only eager attention does, and upstream has no static cache for it
    model = tiny_model(name, attention="eager" if name == "paligemma" else None, text_changes=changes)
    inputs = batch(name, *prompts(name)["several images"])
    _, embeds, positions = watched(model, lambda: model(**inputs))
    with pruned_by(model) as pruning:
        pruned = model(**inputs).logits
        said = generate(model, inputs)
        if name != "paligemma" and lacks_unpruned(name, "static cache") is None:
            assert torch.equal(said, generate(model, inputs, cache_implementation="static"))
    kept = pruning.keep_mask
    if SUPPORTED[name].pair_masks:
        expected = model(**{**inputs, "attention_mask": kept.long(), "position_ids": positions}).logits[kept]
    else:
        ((expected, tokens),) = removed(model, embeds, positions, kept, steps=NEW_TOKENS)
        assert torch.equal(said[0, -NEW_TOKENS:], tokens)
    assert (pruned[kept] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
@torch.no_grad()
def test_a_column_of_padding_keeps_flash_attention_from_splitting_the_row(name, monkeypatch):
    needs(name)
    model, inputs = example(name, "several images")
    with pruned_by(model) as pruning:
        expected, said = model(**inputs).logits, generate(model, inputs)
        # FlashAttention does not run here, so another implementation gets what it would be given
        monkeypatch.setattr("hawk_kernels.hf.packing.splits_at_gaps", lambda *_: True)
        kept, seen = pruning.keep_mask, []
        hook = dissect(model).text.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        logits = model(**inputs).logits
        hook.remove()
        assert torch.equal(generate(model, inputs), said)
    assert (logits - expected)[kept].abs().max() < TOLERANCE
    if not SUPPORTED[name].pair_masks:
        assert seen[0].tolist() == [[0] + [1] * int(kept.sum())]


def without(inputs, *tokens):
    """Inputs without some tokens, which every row has equally often."""
    stays = ~torch.isin(inputs["input_ids"], torch.tensor(tokens))

    def of_stays(value):
        return value[stays].view(len(stays), -1) if value.shape == stays.shape else value

    return {key: of_stays(value) for key, value in inputs.items()}


SIDE_BY_SIDE = (
    "llava",
    "vipllava",
    "llava_next",
    "llava_onevision",
    "paligemma",
    "video_llava",
    "deepseek_vl",
    "fast_vlm",
)


@pytest.mark.parametrize("method", ["hawk", "downsample"])
@pytest.mark.parametrize("name", SIDE_BY_SIDE)
@torch.no_grad()
def test_images_side_by_side_have_a_budget_each(name, method):
    needs(name)
    model, picture = tiny_model(name), BY_NAME[name].picture
    rows = (question([picture] * 2, after=7), question([picture] * 2, seed=3, after=7))
    inputs = without(batch(name, *rows), VISION_START, VISION_END)
    options = {"head_weights": "uniform"} if method == "hawk" else {}
    _, embeds, _ = watched(model, lambda: generate(model, inputs, num_beams=2))
    with prune(model, 3, method=method, budget="per_image", **options) as pruning:
        model(**inputs)
        of_forward = pruning.keep_mask
        generate(model, inputs, num_beams=2)
    assert [sample.budget_per_image for sample in pruning.stats.samples] == [[3, 3]] * 4
    # older transformers give the beams of a sample the images of others, unpruned as well
    if torch.allclose(embeds[::2], embeds[1::2], atol=1e-3):
        assert torch.equal(pruning.keep_mask, of_forward.repeat_interleave(2, dim=0))
    else:
        assert VERSION < NEWEST
    kept = of_forward[inputs["input_ids"] == IMAGE].view(4, -1)
    assert kept.sum(1).tolist() == [3, 3, 3, 3]


@torch.no_grad()
def test_rows_of_patches_that_are_set_apart_are_one_image():
    model, row_break = tiny_model("mistral3"), 7
    rows = [[BEGIN, *([IMAGE] * 3 + [row_break]) * 3, *words(2, i), *([IMAGE] * 3 + [row_break]) * 3] for i in (1, 2)]
    inputs = batch("mistral3", *([*row, *words(3)] for row in rows))
    inputs |= BY_NAME["mistral3"].pixels([[Picture(3, 3)] * 2] * 2, torch.Generator().manual_seed(0))
    with pruned_by(model, keep_ratio=4, budget="per_image") as pruning:
        model(**inputs)
    assert [sample.budget_per_image for sample in pruning.stats.samples] == [[4, 4], [4, 4]]
    assert pruning.keep_mask[inputs["input_ids"] == IMAGE].view(4, 9).sum(1).tolist() == [4, 4, 4, 4]


@torch.no_grad()
def test_the_beams_of_a_sample_keep_the_same_tokens_where_grids_do_not_count_every_token():
    """Each line of HunYuan's patches ends in one more placeholder; tokens may be a multiple of cells by chance."""
    needs("hunyuan_vl")
    model = tiny_model("hunyuan_vl")
    sizes = ([(1, 3)], [(1, 5), (1, 2)], [(3, 5), (2, 2), (1, 2)], [(4, 4)])
    rows = [question([Picture(*size) for size in row], seed=i, after=3) for i, row in enumerate(sizes)]
    with prune(model, 0.25, method="downsample") as pruning:
        generate(model, batch("hunyuan_vl", *rows))
        alone = pruning.keep_mask
        generate(model, batch("hunyuan_vl", *rows), num_beams=3)
    assert torch.equal(pruning.keep_mask, alone.repeat_interleave(3, dim=0))


@pytest.mark.parametrize("name", ["perception_lm", "llava_next_video", "qwen2_5_vl"])
@torch.no_grad()
def test_images_beside_videos_without_a_cache_are_those_of_the_step_before(name):
    """PerceptionLM encodes its videos only inside, and puts them beside the images for the next step."""
    needs(name)
    model, video = tiny_model(name), Picture(2, 3, frames=6)
    inputs = batch(name, question([BY_NAME[name].picture or Picture(3, 3), video]), question(video, seed=2, after=3))
    with pruned_by(model) as pruning:
        expected, keep_mask = generate(model, inputs), pruning.keep_mask
        assert torch.equal(generate(model, inputs, use_cache=False), expected)
    assert torch.equal(pruning.keep_mask, keep_mask)


def attributes(model):
    """What hangs on each module, except what upstream keeps there."""
    return {name: vars(module).keys() - {"rope_deltas"} for name, module in model.named_modules()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
@torch.no_grad()
def test_no_method_leaves_anything_on_the_model(name, method):
    model, inputs = example(name, "several images")
    generated = generate(model, inputs)
    before = attributes(model)
    options = {"head_weights": "uniform"} if METHODS[method].uses_head_weights else {}
    for budget in ("shared", "per_image"):
        with prune(model, 0.3, method=method, budget=budget, **options):
            generate(model, inputs)
        assert attributes(model) == before
    assert torch.equal(generate(model, inputs), generated)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "granite_docling"])
@torch.no_grad()
def test_visual_tokens_that_the_caller_hides_stay_hidden_and_do_not_count(name):
    """Features that later layers add to visual tokens come for the hidden ones too."""
    needs(name)
    model, inputs = example(name, "padded batch")
    _, _, positions = watched(model, lambda: model(**inputs))
    visual = inputs["input_ids"] == IMAGE
    hidden = visual & (visual.cumsum(1) <= 3) & (visual.cumsum(1) > 1)
    inputs = {**inputs, "attention_mask": inputs["attention_mask"] * ~hidden, "position_ids": positions}
    for method in ("hawk", "downsample"):
        options = {"head_weights": "uniform"} if method == "hawk" else {}
        with prune(model, 0.5, method=method, budget="per_image", **options) as pruning:
            pruned = model(**inputs).logits
        kept = pruning.keep_mask
        assert not kept[hidden].any()
        assert [sample.visual_tokens_before for sample in pruning.stats.samples] == (visual & ~hidden).sum(1).tolist()
        expected = model(**{**inputs, "attention_mask": kept.long()}).logits
        assert (pruned - expected)[kept].abs().max() < TOLERANCE
    with (
        prune(model, 0.5, method="hiprune"),
        pytest.raises(ValueError, match=r"attention_mask: expected one that shows every visual token.*got 4 hidden"),
    ):
        model(**inputs)


def test_images_are_those_of_the_encoder_where_its_lengths_fit():
    ids = np.array([[1, 3, 3, 3, 2, 3, 2, 4, 1]] * 2)
    visual = np.isin(ids, (3, 4))
    prompt = Prompt(ids, ids > 0, visual, ~visual, ["", ""], 9)
    kinds = {3: "image", 4: "video"}
    runs = [[3, 1, 1]] * 2
    assert prompt.unit_lengths() == runs
    # one row of features for both rows of ids, as for beams, and a row for each
    once = {"image": [1, 2, 1], "video": [1]}
    for lengths in (once, {kind: each * 2 for kind, each in once.items()}):
        assert prompt.with_images(lengths, kinds).unit_lengths() == [[1, 2, 1, 1]] * 2
    assert [image.tolist() for image in prompt.with_images({"image": [2, 2], "video": [1]}, kinds).images(1)] == [
        [1, 2],
        [3, 5],
        [7],
    ]
    # too few, too many, over the end of a kind, nothing known
    for lengths in (
        {"image": [4]},
        {"image": [2, 2, 1], "video": [1]},
        {"image": [3, 2]},
        {"image": [2, 3]},
        {"image": [5]},
        {"image": []},
        {},
    ):
        assert prompt.with_images(lengths, kinds).unit_lengths() == runs


# what comes out last before RoPE, and norms that queries and keys share or that come after RoPE
LAST_BEFORE_ROPE = ("q_norm", "q_layernorm", "q_b_proj", "q_proj"), ("k_norm", "k_layernorm", "k_proj")
OTHER_NORMS = {
    "llama4": ("qk_norm", "qk_norm"),
    "muse_glimmer": ("qk_norm", "qk_norm"),
    "hunyuan_vl": ("query_layernorm", "key_layernorm"),
}


@families
@torch.no_grad()
def test_scores_come_from_the_queries_and_keys_of_the_first_attention_layer(name):
    needs(name)
    model, inputs = example(name, "several images")
    anatomy = dissect(model)
    index, layer = next((i, layer) for i, layer in enumerate(anatomy.text.layers) if hasattr(layer, "self_attn"))
    attention, seen, hooks = layer.self_attn, {}, []
    for kind, names in zip(("queries", "keys"), LAST_BEFORE_ROPE, strict=True):
        module = next((getattr(attention, n) for n in names if getattr(attention, n, None) is not None), None)
        if module is not None:
            hooks.append(module.register_forward_hook(lambda m, a, out, kind=kind: seen.update({kind: out})))
    hooks.append(layer.register_forward_pre_hook(lambda m, args: seen.update(input=args[0])))
    _, embeds, _ = watched(model, lambda: model(**inputs))
    for hook in hooks:
        hook.remove()
    projections, head_norms = anatomy.projections, OTHER_NORMS.get(name)
    normalized = projections.normalize(seen["input"])
    for i, (kind, found) in enumerate(
        (("queries", projections.queries(normalized)), ("keys", projections.keys(normalized)))
    ):
        if kind not in seen:
            # latent attention makes its keys from two parts
            assert found.shape[-1] == attention.qk_head_dim
            continue
        expected = seen[kind]
        if expected.numel() > found.numel():
            expected = expected.unflatten(-1, (projections.num_heads, -1))[..., : found.shape[-1]]
        if expected.dim() == 4 and expected.shape != found.shape:
            # some put heads first before they norm
            expected = expected.transpose(1, 2)
        expected = expected.reshape(found.shape)
        if head_norms is not None:
            expected = getattr(attention, head_norms[i])(expected)
        assert torch.allclose(found, expected, atol=1e-5)
    if index == 0:
        # what enters the text model enters its first layer, up to a factor that a norm takes out again
        assert torch.allclose(projections.normalize(embeds), normalized, atol=1e-3)


@pytest.mark.parametrize(
    ("attention", "batch_size", "shape", "splits"),
    [
        ("flash_attention_2", 1, (1, 7), True),
        ("flash_attention_2", 1, (3, 1, 7), True),
        ("flash_attention_2", 1, None, True),
        # the first of four rows counts text and has no gaps
        ("flash_attention_2", 1, (4, 1, 7), False),
        ("flash_attention_2", 2, (2, 7), False),
        ("sdpa", 1, (1, 7), False),
    ],
)
def test_where_flash_attention_would_split_a_row(attention, batch_size, shape, splits):
    text = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attention))
    positions = None if shape is None else torch.zeros(shape, dtype=torch.long)
    assert splits_at_gaps(text, batch_size, positions, axes=3) == splits


REFUSED = {
    "mllama": "Mllama",
    "idefics": "IdeficsForVisionText2Text",
    "florence2": "Florence2",
    "udop": "Udop",
    "pix2struct": "Pix2Struct",
    "t5gemma2": "T5Gemma2",
    "blip": "Blip",
    "blip-2": "Blip2",
    "git": "GitForCausalLM",
    "kosmos-2": "Kosmos2",
    "kosmos-2.5": "Kosmos2_5",
    "chameleon": "Chameleon",
    "fuyu": "FuyuForCausalLM",
    "emu3": "Emu3",
    "instructblip": "InstructBlip",
}


@pytest.mark.parametrize(("name", "prefix"), REFUSED.items(), ids=REFUSED)
def test_families_that_are_not_supported_are_refused_by_name(name, prefix):
    class_name = prefix if "For" in prefix else f"{prefix}ForConditionalGeneration"
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        pytest.skip(f"this transformers has no {name}")
    assert model_class.config_class.model_type == name
    known = [reason for types, reason in OUT_OF_REACH.items() if name in types]
    with pytest.raises(TypeError, match=f"docs/families.md lists them.*got {class_name}") as refusal:
        prune(model_class.__new__(model_class), 0.2)
    assert all(reason in str(refusal.value) for reason in known)


@pytest.mark.skipif(VERSION < NEWEST, reason="the lists are those of the newest transformers")
def test_every_model_of_images_and_text_is_supported_or_has_a_reason():
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    supported = {name for family in SUPPORTED.values() for name in family.classes}
    explained = {model_type for types in OUT_OF_REACH for model_type in types}
    for model_type, class_name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        assert (class_name in supported) != (model_type in explained), model_type


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "gemma4", "qwen3_5", "paligemma"])
@torch.no_grad()
def test_what_the_block_hands_over_follows_the_layers_to_another_device(name):
    """Later layers stand on "meta", where any operation that mixes devices fails and only values are missing."""
    needs(name)
    model, inputs = tiny_model(name), batch(name, *prompts(name)["padded batch"])
    with pruned_by(model) as pruning:
        expected = model(**inputs, use_cache=True)
        kept = pruning.keep_mask
    text = dissect(model).text
    for module in (*text.layers[2:], text.norm):
        add_hook_to_module(module, AlignDevicesHook("meta", io_same_device=False, place_submodules=True))
    model.get_output_embeddings().to("meta")
    with pruned_by(model) as pruning:
        output = model(**inputs, use_cache=True)
        assert torch.equal(pruning.keep_mask, kept)
        assert output.logits.device.type == "meta"
        assert output.logits.shape == expected.logits.shape
        token = torch.full((2, 1), FIRST_WORD)
        following = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True).logits
        assert following.shape == (2, 1, expected.logits.shape[-1])
