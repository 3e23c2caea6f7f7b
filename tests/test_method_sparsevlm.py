"""SparseVLM rates by the words and scores by the attention that its literal reference has."""

import re

import pytest
import torch

from csrc_ref.sparsevlm_scores import sparsevlm_raters, sparsevlm_scores
from hawk_kernels import prune
from hawk_kernels.methods import SparseVLM, resolve_method
from tests.family_checks import watched
from tests.method_checks import RAGGED, visual_tokens
from tests.tiny_models import BEGIN, END_OF_TURN, Picture, qwen_batch, qwen_vl, words


@pytest.fixture(scope="module")
def model():
    return qwen_vl(layers=4, attention="eager")


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_scores_are_those_of_the_reference(model, padding):
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    inputs, seen, layer = qwen_batch(*RAGGED, padding=padding), {}, 2
    attention = model.model.language_model.layers[layer - 1].self_attn
    hook = attention.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    _, embeds, _ = watched(model, lambda: model(**inputs))
    hook.remove()
    with prune(model, {layer: 0.3}, method="sparsevlm") as pruning:
        model(**inputs)
    queries, keys = (
        projection(seen["hidden_states"]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    rotate = modeling_qwen2_5_vl.apply_rotary_pos_emb if hasattr(modeling_qwen2_5_vl, "apply_rotary_pos_emb") else None
    if rotate is None:
        pytest.skip("in this version of transformers the layer rotates each axis by itself")
    queries, keys = rotate(queries, keys, *seen["position_embeddings"])
    visual, valid = visual_tokens(inputs), inputs["attention_mask"].bool()
    for row in range(len(RAGGED)):
        if not visual[row].any():
            continue
        text = pruning.query_mask[row]
        raters = sparsevlm_raters(embeds[row, visual[row]], embeds[row, text])
        assert 0 < int(raters.sum()) <= int(text.sum())
        own = valid[row]
        places = text[own].nonzero().flatten()[raters]
        expected = sparsevlm_scores(
            queries[row][:, own],
            keys[row][:, own],
            raters=places.tolist(),
            visual=visual[row][own].nonzero().flatten(),
            scale=attention.scaling,
        )
        assert torch.allclose(pruning.scores[row, visual[row]], expected, atol=1e-6)


@torch.no_grad()
def test_a_question_of_one_word_rates_by_it(model):
    inputs = qwen_batch([BEGIN, Picture(4, 4), *words(1), END_OF_TURN, *words(2, 9)])
    with prune(model, 0.3, method="sparsevlm") as pruning:
        model(**inputs)
    assert int(pruning.query_mask.sum()) == 1
    # those that the stages before have left
    scored = pruning.scores[visual_tokens(inputs) & pruning.scores.isfinite()]
    assert len(scored) == int(16 * 0.3 ** (2 / 3))
    assert (scored > 0).all()


@torch.no_grad()
def test_raters_are_those_of_the_whole_image_at_every_stage():
    """A stage before changes what is left of the image, not which words rate it."""
    model, inputs = qwen_vl(layers=4), qwen_batch(*RAGGED)
    ratios = {}
    for mode in ("drop", "hide"):
        with prune(model, {1: 0.5, 3: 0.2}, method="sparsevlm", mode=mode) as pruning:
            model(**inputs)
        ratios[mode] = pruning
    dropped, hidden = ratios["drop"], ratios["hide"]
    assert torch.equal(dropped.keep_mask, hidden.keep_mask)
    scored = dropped.scores.isfinite()
    assert [int(row.sum()) for row in scored] == [9, 6, 0, 13]


def test_its_stages_stand_where_those_of_the_release_stand():
    assert list(SparseVLM().stages(0.19, 32)) == [3, 7, 16]
    assert SparseVLM().stages(0.125, 32) == pytest.approx({3: 0.5, 7: 0.25, 16: 0.125})


def test_options_are_checked():
    with pytest.raises(ValueError, match=re.escape("rounding: expected 'floor' (paper) or 'ceil' (release), got 'up'")):
        resolve_method("sparsevlm", {"rounding": "up"})
