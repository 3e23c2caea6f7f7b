"""Removing tokens equals hiding them, for every family in the table of tiny models.

Where a layer sees masked tokens all the same (linear attention, convolutions), removing is compared to a text model
that never got them, row by row.
"""

from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import transformers

from bench import support_table
from hawk_kernels import prune
from hawk_kernels.hf.families import FAMILIES, MODES, OUT_OF_REACH, dissect
from hawk_kernels.hf.packing import splits_at_gaps
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import BEGIN, END_OF_TURN, FIRST_WORD, IMAGE, VOCABULARY, Picture, question, words

TOLERANCE = 1e-4
NEW_TOKENS = 4
# only ordinary words, so that no generated placeholder is taken for an image
GREEDY = {"do_sample": False, "suppress_tokens": list(range(FIRST_WORD)), "eos_token_id": VOCABULARY + 1}


SUPPORTED = {family.model_type: family for family in FAMILIES}


def prompts(name):
    """Prompts of a family, by the mode that they are an example of."""
    family = BY_NAME[name]
    one, other = (family.picture or size for size in (Picture(3, 3), Picture(2, 3)))
    video = question(Picture(2, 3, frames=6))
    return {
        "one image": [question(one)],
        "several images": [question([one, other])],
        "padded batch": [question([one, other]), question(other, seed=3, after=2)],
        "text rows": [question(one), [BEGIN, *words(7), END_OF_TURN, *words(2)]],
        # where frames are marked as images a batch has the one or the other
        "video": [video] if family.video_token == IMAGE else [video, question(one, seed=2, after=3)],
    }


CELLS = [
    (name, prompt) for name in BY_NAME for prompt in ("one image", *SUPPORTED[name].modes) if prompt in prompts(name)
]
cells = pytest.mark.parametrize(("name", "prompt"), CELLS, ids=lambda value: value)
families = pytest.mark.parametrize("name", BY_NAME)


@lru_cache(maxsize=1)
def model_of(name):
    return tiny_model(name)


def watched(model, call):
    """What reaches the text model first in `call`: its embeddings and position ids."""
    seen = []

    def look(module, args, kwargs):
        if not seen and kwargs.get("inputs_embeds") is not None:
            embeds, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
            seen.extend([embeds, torch.arange(embeds.shape[1])[None] if positions is None else positions])

    hook = dissect(model).text.register_forward_pre_hook(look, with_kwargs=True)
    output = call()
    hook.remove()
    return output, *seen


def generate(model, inputs, **options):
    return model.generate(**{**inputs, **GREEDY, "max_new_tokens": NEW_TOKENS, **options})


def packed_positions(positions, kept):
    """Position ids of the kept tokens of one row; of four rows of positions the first must have no gaps."""
    packed = positions[..., kept[0]]
    if packed.dim() == 3 and packed.shape[0] == 4:
        packed = torch.cat([torch.arange(packed.shape[-1]).expand(1, 1, -1), packed[1:]])
    return packed


def removed(model, embeds, positions, keep_mask, steps):
    """Logits and greedy tokens of the text model for the kept tokens alone, row by row."""
    text = dissect(model).text
    for row, kept in enumerate(keep_mask):
        of_row = positions.expand(*positions.shape[:-2], len(keep_mask), -1)[..., row : row + 1, :]
        of_row = packed_positions(of_row, kept[None])
        output = text(inputs_embeds=embeds[row : row + 1, kept], position_ids=of_row, use_cache=True)
        logits, following = (
            model.get_output_embeddings()(output.last_hidden_state)[0],
            positions[..., row : row + 1, -1:],
        )
        said = []
        for _ in range(steps):
            token = model.get_output_embeddings()(output.last_hidden_state)[:, -1].index_fill(
                -1, torch.arange(FIRST_WORD), -torch.inf
            )
            said.append(token.argmax(-1, keepdim=True))
            following = following + 1
            output = text(
                inputs_embeds=model.get_input_embeddings()(said[-1]),
                position_ids=following,
                past_key_values=output.past_key_values,
            )
        yield logits, torch.cat(said, dim=1)[0] if said else None


@cells
@torch.no_grad()
def test_logits_equal_those_with_hidden_tokens(name, prompt):
    family, model, inputs = BY_NAME[name], model_of(name), batch(name, *prompts(name)[prompt])
    whole, embeds, positions = watched(model, lambda: model(**inputs).logits)
    with prune(model, 0.3, head_weights="uniform") as pruning:
        pruned = model(**inputs).logits
    kept = pruning.keep_mask
    if family.hides:
        hidden = model(**{**inputs, "attention_mask": kept.long(), "position_ids": positions}).logits
        error = (pruned - hidden)[kept]
    else:
        rows = removed(model, embeds, positions, kept, steps=0)
        error = torch.cat([pruned[row, kept[row]] - logits for row, (logits, _) in enumerate(rows)])
    assert error.abs().max() < TOLERANCE
    assert (pruned - whole)[kept].abs().max() > 100 * TOLERANCE
    assert [sample.visual_tokens_after for sample in pruning.stats.samples] == [
        int(0.3 * sample.visual_tokens_before) for sample in pruning.stats.samples
    ]


@cells
@torch.no_grad()
def test_greedy_tokens_equal_those_with_hidden_tokens(name, prompt):
    family, model, inputs = BY_NAME[name], model_of(name), batch(name, *prompts(name)[prompt])
    length = inputs["input_ids"].shape[1]
    whole, embeds, positions = watched(model, lambda: generate(model, inputs))
    with prune(model, 0.3, head_weights="uniform") as pruning:
        pruned = generate(model, inputs)
    assert torch.equal(pruned[:, :length], inputs["input_ids"])
    assert pruned.shape == whole.shape
    kept = pruning.keep_mask
    if family.hides:
        positions = positions - family.first_position
        hidden = generate(model, {**inputs, "attention_mask": kept.long(), "position_ids": positions})
        assert torch.equal(pruned, hidden)
    else:
        rows = removed(model, embeds, positions, kept, steps=NEW_TOKENS)
        assert torch.equal(pruned[:, length:], torch.stack([said for _, said in rows]))


@families
@torch.no_grad()
def test_keeping_everything_is_identical_and_leaving_the_block_leaves_no_trace(name):
    model, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
    whole = generate(model, inputs)
    before = [(dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in model.modules()]
    with prune(model, 1.0, head_weights="uniform") as pruning:
        assert torch.equal(generate(model, inputs), whole)
    assert torch.equal(pruning.keep_mask, inputs["attention_mask"].bool())
    with prune(model, 0.2, head_weights="uniform"):
        model(**inputs)
    after = [(dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in model.modules()]
    assert after == before
    assert torch.equal(generate(model, inputs), whole)


OPTIONS = {
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "use_cache=False": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


GENERATED = [(name, mode) for name in BY_NAME for mode in SUPPORTED[name].modes if mode in OPTIONS]
MISSING = [(name, mode) for name in BY_NAME for mode in SUPPORTED[name].without]


@pytest.mark.parametrize(("name", "mode"), GENERATED, ids=lambda value: value)
@torch.no_grad()
def test_generation_modes(name, mode):
    family, model, options = BY_NAME[name], model_of(name), OPTIONS[mode]
    # upstream looks prompts up one row at a time; a row alone can be removed from physically
    inputs = batch(
        name, *prompts(name)["several images" if mode == "prompt lookup" or not family.hides else "padded batch"]
    )
    _, embeds, positions = watched(model, lambda: generate(model, inputs))
    torch.manual_seed(1)
    whole = generate(model, inputs, **options)
    torch.manual_seed(1)
    with prune(model, 0.3, head_weights="uniform") as pruning:
        pruned = generate(model, inputs, **options)
    of_beams = pruning.keep_mask.unflatten(0, (len(embeds), -1))
    kept = of_beams[:, 0]
    assert torch.equal(of_beams, kept[:, None].expand_as(of_beams))
    assert pruned.shape == whole.shape
    assert (kept.sum(1) < inputs["attention_mask"].sum(1)).all()
    torch.manual_seed(1)
    if family.hides:
        hidden = {**inputs, "attention_mask": kept.long(), "position_ids": positions - family.first_position}
        assert torch.equal(pruned, generate(model, hidden, **options))
    else:
        without = {
            "inputs_embeds": embeds[:, kept[0]],
            "attention_mask": torch.ones(1, int(kept.sum()), dtype=torch.long),
            "position_ids": packed_positions(positions, kept),
        }
        said = generate(model, without, **options)
        assert torch.equal(pruned[:, inputs["input_ids"].shape[1] :], said)


WINDOW = 6
# cohere_compass and muse_glimmer have windows too, but there is more to their logits than a text model and its head
# where the text model sees kept tokens alone, windows count them; where masks over pairs are packed, as before
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
    # PaliGemma 2 caps its attention, which only eager attention does, and upstream has no static cache for it
    model = tiny_model(name, attention="eager" if name == "paligemma" else None, text_changes=changes)
    inputs = batch(name, *prompts(name)["several images"])
    _, embeds, positions = watched(model, lambda: model(**inputs))
    with prune(model, 0.3, head_weights="uniform") as pruning:
        pruned = model(**inputs).logits
        said = generate(model, inputs)
        if name != "paligemma":
            assert torch.equal(said, generate(model, inputs, cache_implementation="static"))
    kept = pruning.keep_mask
    if SUPPORTED[name].pair_masks:
        expected = model(**{**inputs, "attention_mask": kept.long(), "position_ids": positions}).logits[kept]
    else:
        ((expected, tokens),) = removed(model, embeds, positions, kept, steps=NEW_TOKENS)
        assert torch.equal(said[0, -NEW_TOKENS:], tokens)
    assert (pruned[kept] - expected).abs().max() < TOLERANCE


def compiled_decoding(model, inputs, positions):
    """Tokens of compiled decoding over a static cache, and how many graphs that took."""
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    output = model(**inputs, past_key_values=cache, logits_to_keep=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    said, words_only = [], torch.arange(FIRST_WORD)
    for step in range(1, NEW_TOKENS + 1):
        said.append(output.logits[:, -1:].index_fill(-1, words_only, -torch.inf).argmax(-1))
        position = positions[..., -1:] + step
        output = compiled(input_ids=said[-1], past_key_values=cache, position_ids=position)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return torch.cat(said, dim=1), graphs


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "gemma4", "paligemma", "qwen3_5", "kimi_k25"])
@torch.no_grad()
def test_compiled_decoding_takes_no_more_graphs_than_unpruned(name):
    model, inputs = model_of(name), batch(name, *prompts(name)["several images"])
    length = inputs["input_ids"].shape[1]
    _, _, positions = watched(model, lambda: generate(model, inputs))
    expected, graphs = compiled_decoding(model, inputs, positions)
    assert torch.equal(expected, generate(model, inputs)[:, length:])
    with prune(model, 0.3, head_weights="uniform"):
        expected = generate(model, inputs)[:, length:]
        said, pruned_graphs = compiled_decoding(model, inputs, positions)
    assert torch.equal(said, expected)
    assert pruned_graphs == graphs


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
@torch.no_grad()
def test_a_column_of_padding_keeps_flash_attention_from_splitting_the_row(name, monkeypatch):
    model, inputs = model_of(name), batch(name, *prompts(name)["several images"])
    with prune(model, 0.3, head_weights="uniform") as pruning:
        expected, said = model(**inputs).logits, generate(model, inputs)
        # nothing here runs FlashAttention: what it would be given is given to another implementation
        monkeypatch.setattr("hawk_kernels.hf.prune.splits_at_gaps", lambda *_: True)
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


@pytest.mark.parametrize(("name", "mode"), MISSING, ids=lambda value: value)
@torch.no_grad()
def test_modes_that_are_not_listed_do_not_work_unpruned_either(name, mode):
    model = model_of(name)
    inputs = batch(name, *prompts(name)["several images" if mode == "prompt lookup" else "padded batch"])
    _, plain, _ = watched(model, lambda: generate(model, inputs))
    try:
        _, embeds, _ = watched(model, lambda: generate(model, inputs, **OPTIONS[mode]))
    except (ValueError, IndexError):
        return
    # upstream gives the beams of a sample features of other images
    beams = embeds.unflatten(0, (len(plain), -1))
    assert not torch.allclose(beams, plain[:, None].expand_as(beams), atol=1e-3)


@families
@torch.no_grad()
def test_a_budget_for_each_image_with_eager_attention(name):
    family, model, inputs = (
        BY_NAME[name],
        tiny_model(name, attention="eager"),
        batch(name, *prompts(name)["padded batch"]),
    )
    _, embeds, positions = watched(model, lambda: model(**inputs))
    with prune(model, 2, head_weights="uniform", budget="per_image") as pruning:
        pruned = model(**inputs).logits
    assert [sample.budget_per_image for sample in pruning.stats.samples] == [[2, 2], [2]]
    kept = pruning.keep_mask
    if family.hides:
        hidden = model(**{**inputs, "attention_mask": kept.long(), "position_ids": positions}).logits
        error = (pruned - hidden)[kept]
    else:
        rows = removed(model, embeds, positions, kept, steps=0)
        error = torch.cat([pruned[row, kept[row]] - logits for row, (logits, _) in enumerate(rows)])
    assert error.abs().max() < TOLERANCE


@families
@torch.no_grad()
def test_bfloat16_weights(name):
    model, inputs = tiny_model(name).bfloat16(), batch(name, *prompts(name)["padded batch"])
    inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    with prune(model, 0.3, head_weights="uniform") as pruning:
        assert model(**inputs).logits.isfinite().all()
    assert pruning.scores.dtype == torch.float32
    assert all(sample.visual_tokens_after < sample.visual_tokens_before for sample in pruning.stats.samples)


# what comes out last before RoPE, and norms that queries and keys share or that come behind RoPE
LAST_BEFORE_ROPE = ("q_norm", "q_layernorm", "q_b_proj", "q_proj"), ("k_norm", "k_layernorm", "k_proj")
OTHER_NORMS = {
    "llama4": ("qk_norm", "qk_norm"),
    "muse_glimmer": ("qk_norm", "qk_norm"),
    "hunyuan_vl": ("query_layernorm", "key_layernorm"),
}


@families
@torch.no_grad()
def test_scores_come_from_the_queries_and_keys_of_the_first_attention_layer(name):
    model, inputs = model_of(name), batch(name, *prompts(name)["several images"])
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
        # what enters the text model enters its first layer, but for a factor that a norm takes out again
        assert torch.allclose(projections.normalize(embeds), normalized, atol=1e-3)


def test_every_family_is_tested_in_every_mode_that_is_listed():
    assert set(SUPPORTED) == set(BY_NAME)
    examples = {*prompts("llava"), *OPTIONS}
    assert set(MODES) <= examples
    assert all(family.video == bool(BY_NAME[family.model_type].video) for family in FAMILIES)


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
    with pytest.raises(TypeError, match=f"got {class_name}.*supported families: .*llava") as refusal:
        prune(model_class.__new__(model_class), 0.2)
    assert all(reason in str(refusal.value) for reason in known)


def test_the_support_table_of_the_readme_is_the_one_of_the_families():
    assert support_table.main(["--check"]) == 0
    assert all(f"| `{name}` |" in support_table.table() for name in BY_NAME)
