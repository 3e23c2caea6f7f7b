"""Llama 4 scales attention by the number of tokens before a query; rows so long that this matters are refused."""

import pytest
import torch

from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.packing import slot_limit
from tests.family_checks import GREEDY, expected_logits, prompts, watched
from tests.tiny_families import batch, tiny_model

TOLERANCE = 1e-4


def llama4(inputs, spare, **changes):
    """A model whose temperature rises `spare` tokens after the end of the prompt."""
    floor_scale = inputs["input_ids"].shape[1] + spare + 1
    return tiny_model("llama4", text_changes={"floor_scale": floor_scale, "no_rope_layers": [1, 0, 1, 0], **changes})


@pytest.fixture(scope="module")
def inputs():
    return batch("llama4", *prompts("llama4")["padded batch"])


@torch.no_grad()
def test_rows_that_reach_the_length_are_refused(inputs):
    model = llama4(inputs, spare=-1)
    whole = model(**inputs).logits
    with prune(model, 0.3, head_weights="uniform"), pytest.raises(ValueError, match="expected rows of at most"):
        model(**inputs)
    with prune(model, 1.0, head_weights="uniform"):
        assert torch.equal(model(**inputs).logits, whole)


@pytest.mark.parametrize("changes", [{"attn_temperature_tuning": False}, {"no_rope_layers": [1, 1, 1, 1]}])
@torch.no_grad()
def test_models_without_a_temperature_take_any_length(inputs, changes):
    model = llama4(inputs, spare=-1, **changes)
    with prune(model, 0.3, head_weights="uniform"):
        model(**inputs)


@torch.no_grad()
def test_rows_below_the_length_equal_those_with_hidden_tokens(inputs):
    model = llama4(inputs, spare=0)
    _, embeds, positions = watched(model, lambda: model(**inputs))
    with prune(model, 0.3, head_weights="uniform") as pruning:
        pruned, kept = model(**inputs).logits, pruning.keep_mask
    expected = expected_logits("llama4", model, inputs, kept, embeds, positions)
    assert (pruned - expected)[kept].abs().max() < TOLERANCE


@pytest.mark.parametrize("cache", [None, "static"])
@torch.no_grad()
def test_generation_stops_where_the_length_is_reached(inputs, cache):
    model = llama4(inputs, spare=3)
    with prune(model, 0.3, head_weights="uniform"):
        # the last of four tokens is never read
        model.generate(**inputs, **GREEDY, max_new_tokens=4 if cache is None else 3, cache_implementation=cache)
        with pytest.raises(ValueError, match="padding and generated tokens included"):
            model.generate(**inputs, **GREEDY, max_new_tokens=5, cache_implementation=cache)


def test_no_other_family_is_limited():
    assert slot_limit(dissect(tiny_model("llava"))) is None
