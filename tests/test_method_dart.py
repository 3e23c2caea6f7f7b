"""DART keeps what its literal reference keeps."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csrc_ref.dart_select import dart_select as reference
from hawk_kernels import prune
from hawk_kernels.methods import resolve_method
from hawk_kernels.methods.dart import dart_select
from tests.method_checks import against_its_reference, check_choice, visual_tokens
from tests.tiny_models import Picture, question, qwen_batch


@against_its_reference
def test_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    def choose(layer, row, places, count, frames):
        text = layer.text[row].nonzero().flatten()
        visual_norm, text_norm = (layer.keys[row][:, where].abs().sum(dim=(0, 2))[None] for where in (places, text))
        visual, words = layer.embeds[row, places][None], layer.embeds[row, text][None]
        masks = {"mask": torch.ones(1, len(places)).bool(), "text_mask": torch.ones(1, len(text)).bool()}
        return reference(visual, visual_norm, words, text_norm, count, **masks).mask[0]

    check_choice(three_layers, "dart", budget, keep_ratio, choose)


@given(
    seed=st.integers(0, 2**20),
    num_tokens=st.integers(1, 14),
    num_words=st.integers(0, 6),
    pivots=st.integers(1, 5),
    text_pivots=st.integers(0, 5),
    r=st.one_of(st.floats(0.01, 1.0), st.integers(1, 14)),
)
def test_the_choice_is_that_of_the_reference(seed, num_tokens, num_words, pivots, text_pivots, r):
    generator = torch.Generator().manual_seed(seed)
    visual, text = (torch.randn(3, count, 6, generator=generator) for count in (num_tokens, num_words))
    norms = [torch.rand(3, count, generator=generator).mul(8).round() for count in (num_tokens, num_words)]
    mask, text_mask = (torch.rand(3, count, generator=generator) < 0.7 for count in (num_tokens, num_words))
    arguments = (visual, norms[0], text, norms[1], r)
    options = {"mask": mask, "text_mask": text_mask, "pivots": pivots, "text_pivots": text_pivots}
    found, expected = dart_select(*arguments, **options), reference(*arguments, **options)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.indices, expected.indices)
    assert torch.allclose(found.scores, expected.scores, atol=1e-5)


@torch.no_grad()
def test_after_a_layer_it_reads_the_keys_and_states_of_the_next(three_layers):
    """The authors prune after the second layer: pivots and cosines are those of what enters the third."""
    inputs = qwen_batch(question(Picture(6, 6)), question(Picture(4, 7)))
    layer, entering = three_layers.model.language_model.layers[2], []
    hook = layer.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    three_layers(**inputs)
    hook.remove()
    with prune(three_layers, {2: ("dart", 0.2)}) as pruning:
        three_layers(**inputs)
    keys = layer.self_attn.k_proj(layer.input_layernorm(entering[0])).abs().sum(-1)
    for row in range(2):
        places = visual_tokens(inputs)[row].nonzero().flatten()
        text = pruning.query_mask[row]
        chosen = reference(
            entering[0][row, places][None],
            keys[row, places][None],
            entering[0][row, text][None],
            keys[row, text][None],
            0.2,
            mask=torch.ones(1, len(places)).bool(),
            text_mask=torch.ones(1, int(text.sum())).bool(),
        )
        assert torch.equal(pruning.keep_mask[row, places], chosen.mask[0])
    assert pruning.stats.samples[0].visual_tokens_by_layer == (36, 36, 7)
    with prune(three_layers, 0.2, method="dart", layer=2) as same:
        three_layers(**inputs)
    assert torch.equal(same.keep_mask, pruning.keep_mask)
    assert same.stats.samples[0].visual_tokens_by_layer == (36, 36, 7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pivots": 0}, ValueError, "pivots: expected an int >= 1, got 0"),
        ({"text_pivots": -1}, ValueError, "text_pivots: expected an int >= 0, got -1"),
        ({"pivots": 2.0}, TypeError, "pivots: expected an int >= 1, got float"),
        ({"layer": 0}, ValueError, "layer: expected the last layer that sees every token, counted from 1, or None"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        resolve_method("dart", options)
