"""SparseVLM rates by the words and scores by the attention that its literal reference has."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csrc_ref.sparsevlm_recycle import sparsevlm_recycle
from csrc_ref.sparsevlm_scores import sparsevlm_raters, sparsevlm_scores
from hawk_kernels import compact, prune
from hawk_kernels.methods import Method, SparseVLM, resolve_method
from hawk_kernels.methods.sparsevlm import recycling
from hawk_kernels.selection import Merge
from tests.family_checks import model_of, prompts, watched
from tests.method_checks import GREEDY, RAGGED, visual_tokens
from tests.tiny_families import batch
from tests.tiny_models import BEGIN, END_OF_TURN, Picture, question, qwen_batch, qwen_vl, words


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


@given(
    seed=st.integers(0, 2**20),
    num_tokens=st.integers(1, 60),
    keep=st.integers(1, 60),
    ties=st.booleans(),
    merging=st.sampled_from(["paper", "release"]),
)
def test_recycled_tokens_are_those_of_the_reference(seed, num_tokens, keep, ties, merging):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, num_tokens, 6, generator=generator)
    scores = torch.rand(2, num_tokens, generator=generator)
    scores = scores.mul(4).round() if ties else scores
    mask = torch.rand(2, num_tokens, generator=generator) < 0.9
    found = recycling(scores, states, keep, mask=mask, merging=merging)
    target, source, weight = found.merge
    for row in range(2):
        places = mask[row].nonzero().flatten()
        budget = min(keep, len(places))
        expected, members = sparsevlm_recycle(scores[row, places], states[row, places], budget, merging)
        assert found.mask[row].nonzero().flatten().tolist() == places[expected].tolist()
        clusters = {int(places[centre]): set(places[tokens].tolist()) for centre, tokens in members.items()}
        of_target = {
            centre: set(source[row, target[row] == centre].tolist()) for centre in set(target[row].tolist()) - {-1}
        }
        assert of_target == clusters
        for centre, tokens in clusters.items():
            assert weight[row, target[row] == centre].tolist() == pytest.approx([1 / len(tokens)] * len(tokens))


@pytest.mark.parametrize(
    ("num_tokens", "alone", "clusters"),
    [(576, 300, 9), (309, 200, 4), (204, 110, 3), (576, 303, 9), (312, 110, 7), (117, 36, 3), (82, 30, 2), (32, 17, 1)],
)
def test_a_budget_holds_what_the_release_keeps_and_its_clusters(num_tokens, alone, clusters):
    """The release clusters `floor(0.3 k) + 1` of the `k` tokens that leave, ten to a cluster, and one cluster more."""
    scores, states = torch.rand(1, num_tokens), torch.randn(1, num_tokens, 4)
    mask = torch.ones(1, num_tokens, dtype=torch.bool)
    found = recycling(scores, states, alone + clusters, mask=mask, merging="release")
    best = scores.argsort(descending=True)[0, :alone]
    assert int(found.mask.sum()) == alone + clusters
    assert found.mask[0, best].all()
    merged = found.merge.target[0] >= 0
    assert int(merged.sum()) == int((num_tokens - alone) * 0.3) + 1
    assert len(set(found.merge.target[0, merged].tolist())) == clusters


def test_a_recycled_token_is_the_mean_of_its_cluster():
    """Two tight groups among the dropped tokens become their two means."""
    groups = torch.tensor([[0.0, 0.0], [9.0, 9.0]]).repeat_interleave(10, dim=0)
    states = torch.cat([torch.full((10, 2), 99.0), groups + torch.randn(20, 2) / 100, torch.zeros(50, 2)])[None]
    scores = torch.arange(80, 0, -1.0)[None]
    found = recycling(scores, states, 12, mask=torch.ones(1, 80, dtype=torch.bool))
    assert int(found.mask.sum()) == 12
    packed = compact(states, found.mask, merge=found.merge.ordered()).inputs_embeds[0]
    assert sorted(packed[9:].round().tolist())[0] == [0.0, 0.0]
    assert [9.0, 9.0] in packed.round().tolist()


@pytest.mark.parametrize("budget", ["shared", "per_image"])
@torch.no_grad()
def test_states_are_merged_where_they_are_cut(budget):
    """What enters the layer before the stage is clustered, and what enters the layer after it is averaged."""
    model, inputs = qwen_vl(layers=3), qwen_batch(question(Picture(8, 8)), question(Picture(5, 9)))
    layers, seen = model.model.language_model.layers, {}
    with prune(model, {1: 0.2}, method="sparsevlm", recycle=True, budget=budget) as pruning:
        hook = layers[1].register_forward_pre_hook(lambda _, args, kwargs: seen.update(states=args), with_kwargs=True)
        logits = model(**inputs).logits
        hook.remove()
    with prune(model, {1: 0.2}, method="sparsevlm", budget=budget) as plain:
        without = model(**inputs).logits
    assert torch.equal(pruning.keep_mask.sum(1), plain.keep_mask.sum(1))
    assert not torch.equal(pruning.keep_mask, plain.keep_mask)
    assert (logits - without).abs().max() > 1e-4
    entering = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: entering.append(args[0])) for layer in layers[:2]]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    for row in range(2):
        own = inputs["attention_mask"][row].bool()
        visual = visual_tokens(inputs)[row]
        places = visual.nonzero().flatten()
        expected, members = sparsevlm_recycle(pruning.scores[row, places], entering[0][row, places], len(places) // 5)
        kept = pruning.keep_mask[row]
        assert (kept & visual).nonzero().flatten().tolist() == places[expected].tolist()
        cut = entering[1][row].clone()
        for centre, tokens in members.items():
            cut[places[centre]] = entering[1][row, places[tokens]].mean(0)
        assert members
        assert torch.allclose(seen["states"][0][row][-int(kept.sum()) :], cut[kept & own], atol=1e-5)


@torch.no_grad()
def test_recycling_generates_the_same_with_and_without_a_cache():
    model, inputs = qwen_vl(layers=4), qwen_batch(*RAGGED)
    tokens = []
    for use_cache in (True, False):
        with prune(model, {1: 0.5, 2: 0.2}, method="sparsevlm", recycle=True):
            tokens.append(model.generate(**inputs, **GREEDY, use_cache=use_cache))
    assert torch.equal(*tokens)


@torch.no_grad()
def test_features_of_later_layers_go_through_the_map():
    """A map of tokens to themselves changes nothing, also where features are added to visual tokens later."""

    class Itself(Method):
        name, merges = "itself", True

        def score(self, view):
            return view.visual_embeddings().float().norm(dim=-1).masked_fill(~view.candidates, -torch.inf)

        def select(self, view, r):
            found = super().select(view, r)
            own = torch.arange(found.mask.shape[1]).expand_as(found.mask)
            target = torch.where(found.mask, own, -1)
            return found.merging(Merge(target, own.contiguous(), torch.ones(own.shape))) if self.merges else found

    model, inputs = model_of("qwen3_vl"), batch("qwen3_vl", *prompts("qwen3_vl")["padded batch"])
    logits = []
    for merges in (True, False):
        method = Itself()
        method.merges = merges
        with prune(model, {1: 0.4}, method=method):
            logits.append(model(**inputs).logits)
    assert torch.allclose(*logits, atol=1e-5)


def test_hiding_cannot_merge():
    model, inputs = qwen_vl(layers=3), qwen_batch(question(Picture(8, 8)))
    refused = pytest.raises(ValueError, match="mode: expected 'drop' with a method that merges tokens")
    with torch.no_grad(), prune(model, {1: 0.2}, method="sparsevlm", recycle=True, mode="hide"), refused:
        model(**inputs)


def test_options_are_checked():
    with pytest.raises(TypeError, match="recycle: expected a bool, got int"):
        resolve_method("sparsevlm", {"recycle": 1})
    with pytest.raises(ValueError, match="merging: expected 'paper' or 'release', got 'sum'"):
        resolve_method("sparsevlm", {"merging": "sum"})
    with pytest.raises(ValueError, match=re.escape("'nearest' (half to even), got 'up'")):
        resolve_method("sparsevlm", {"rounding": "up"})
