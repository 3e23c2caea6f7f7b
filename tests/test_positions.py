"""`prune(positions="packed")`: the tokens that stay are numbered as in a prompt that never had the others."""

import copy

import pytest
import torch

from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from tests.family_checks import TOLERANCE, assistant_of, generate, model_of, prompts, watched
from tests.method_checks import families
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import words

# full attention, sliding windows, convolutions between attention, images with newlines and tiles
FAMILIES = ["llava", "llava_next", "internvl", "smolvlm", "mistral3", "lfm2_vl", "aya_vision"]

WINDOWS_OF_THE_WHOLE_PROMPT = {"gemma3", "gemma4", "gemma4_unified"}


def packed(model, **options):
    return prune(model, **{"keep_ratio": 0.3, "head_weights": "uniform", "positions": "packed", **options})


def shortened(name, prompt="several images"):
    """A family's model, its inputs, what it embeds, and the tokens that stay."""
    model, inputs = model_of(name), batch(name, *prompts(name)[prompt])
    _, embeds, _ = watched(model, lambda: model(**inputs))
    with packed(model) as pruning:
        logits = model(**inputs).logits
    return model, inputs, embeds, pruning.keep_mask, logits


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_tokens_are_those_of_the_short_prompt_without_position_ids(name):
    model, inputs, embeds, kept, logits = shortened(name)
    short = {"inputs_embeds": embeds[:, kept[0]]}
    expected = model(**short).logits
    assert (logits[:, kept[0]] - expected).abs().max() < TOLERANCE
    with prune(model, 0.3, head_weights="uniform") as pruning:
        original = model(**inputs).logits
    assert torch.equal(pruning.keep_mask, kept)
    assert (original - logits)[kept].abs().max() > 10 * TOLERANCE, "the positions make no difference here"
    with packed(model) as pruning:
        said = generate(model, inputs)
    assert pruning.stats.positions == "packed"
    ones = torch.ones(1, int(kept.sum()), dtype=torch.long)
    assert torch.equal(said[:, kept.shape[1] :], generate(model, short, attention_mask=ones))


@families(BY_NAME)
def test_every_family_is_served_or_refused(name):
    """Some models want the pixels, so there the others are hidden; elsewhere the text model is asked."""
    model = model_of(name)
    if hasattr(dissect(model).multimodal, "get_rope_index") or name in WINDOWS_OF_THE_WHOLE_PROMPT:
        with pytest.raises(TypeError, match=f"positions: expected 'original' for {name}, got 'packed'"):
            packed(model)
        return
    model, inputs, embeds, kept, logits = shortened(name)
    if BY_NAME[name].hides:
        positions = (kept.cumsum(1) - 1).clamp(min=0) + BY_NAME[name].first_position
        expected = model(**{**inputs, "attention_mask": kept.long(), "position_ids": positions}).logits[kept]
    else:
        states = dissect(model).text(inputs_embeds=embeds[:, kept[0]]).last_hidden_state
        expected = model.get_output_embeddings()(states)[0]
    assert (logits[kept] - expected).abs().max() < TOLERANCE


MODES = {
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "assisted": {},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_generate(mode):
    model, inputs, embeds, kept, _ = shortened("llava")
    options = {"assistant_model": assistant_of("llava")} if mode == "assisted" else MODES[mode]
    torch.manual_seed(1)
    with packed(model):
        said = generate(model, inputs, **options)
    ones = torch.ones(1, int(kept.sum()), dtype=torch.long)
    torch.manual_seed(1)
    # what is proposed changes no greedy token
    plain = {} if mode in ("assisted", "prompt lookup") else options
    expected = generate(model, {"inputs_embeds": embeds[:, kept[0]], "attention_mask": ones}, **plain)
    assert torch.equal(said[:, kept.shape[1] :], expected)


def test_rows_of_different_lengths():
    model, inputs, embeds, kept, logits = shortened("llava", "padded batch")
    with packed(model):
        said = generate(model, inputs)
    for row, of_row in enumerate(kept):
        short = embeds[row : row + 1, of_row]
        assert (logits[row, of_row] - model(inputs_embeds=short).logits[0]).abs().max() < TOLERANCE
        ones = torch.ones(short.shape[:2], dtype=torch.long)
        expected = generate(model, {"inputs_embeds": short, "attention_mask": ones})
        assert torch.equal(said[row, kept.shape[1] :], expected[0])


@pytest.mark.parametrize("way", ["mask", "position ids", "nothing", "copied", "reordered"])
def test_a_second_turn_continues_the_packed_positions(way):
    model, inputs, embeds, kept, _ = shortened("llava", "padded batch")
    new = torch.tensor([words(3, seed=7), words(3, seed=8)])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
    positions = (mask.cumsum(1) - 1)[:, -3:]
    more = {
        "mask": {"attention_mask": mask},
        "position ids": {"attention_mask": mask, "position_ids": positions},
        "nothing": {},
        "copied": {"attention_mask": mask},
        "reordered": {"attention_mask": mask.flip(0), "position_ids": positions.flip(0)},
    }[way]
    order = [1, 0] if way == "reordered" else [0, 1]
    with packed(model), torch.no_grad():
        first = {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
        cache = model(**first, use_cache=True).past_key_values
        if way == "copied":
            cache = copy.deepcopy(cache)
        if way == "reordered":
            cache.reorder_cache(torch.tensor(order))
        logits = model(input_ids=new[order], past_key_values=cache, **more).logits
    for row, of_row in enumerate(kept):
        text = model.get_input_embeddings()(new[row : row + 1])
        whole = torch.cat([embeds[row : row + 1, of_row], text], dim=1)
        expected = model(inputs_embeds=whole).logits[0, -3:]
        assert (logits[order.index(row)] - expected).abs().max() < TOLERANCE


def test_what_has_no_packed_positions_is_refused_by_name():
    for name, message in (
        ("qwen2_5_vl", "positions: expected 'original' for qwen2_5_vl, got 'packed'; its position ids tell time, row"),
        ("gemma3", "positions: expected 'original' for gemma3, got 'packed'; the masks of its sliding windows"),
    ):
        with pytest.raises(TypeError, match=message):
            packed(tiny_model(name))
    with pytest.raises(ValueError, match="tokens that leave after layer 1, got 'packed'; the layers up to there"):
        packed(model_of("llava"), keep_ratio={0: 0.5, 1: 0.2})


def test_original_positions_are_the_default():
    model, inputs, *_ = shortened("llava")
    with prune(model, 0.3, head_weights="uniform") as unsaid:
        plain = model(**inputs).logits
    with packed(model, positions="original") as pruning:
        assert torch.equal(model(**inputs).logits, plain)
    assert unsaid.stats.positions == pruning.stats.positions == "original"
