"""Text models that begin with layers without attention: tokens are ranked by what enters the first attention layer."""

import pytest
import torch

import csrc_ref
from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect, first_attention_layer
from hawk_kernels.methods import METHODS
from tests.family_checks import needs, prompts, watched
from tests.method_checks import options_of
from tests.tiny_families import BY_NAME, batch, tiny_model

HYBRIDS = [name for name, family in BY_NAME.items() if not family.hides]
TOLERANCE = 1e-4


class Attention:
    """What the first attention layer gets in an unpruned call: its input, queries and keys before RoPE."""

    def __init__(self, model, inputs):
        anatomy = dissect(model)
        self.index, layer = first_attention_layer(anatomy.text)
        seen = []
        hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        _, self.embeds, _ = watched(model, lambda: model(**inputs))
        hook.remove()
        (self.states,) = seen
        normalized = anatomy.projections.normalize(self.states)
        self.queries = anatomy.projections.queries(normalized).transpose(1, 2)
        self.keys = anatomy.projections.keys(normalized).transpose(1, 2)


@pytest.mark.parametrize("prompt", ["padded batch", "text rows"])
@pytest.mark.parametrize("name", HYBRIDS)
@torch.no_grad()
def test_scores_are_those_of_the_real_input_of_the_first_attention_layer(name, prompt):
    needs(name)
    model, inputs = tiny_model(name), batch(name, *prompts(name)[prompt])
    layer = Attention(model, inputs)
    assert layer.index > 0
    weights = torch.linspace(0.5, 2, layer.queries.shape[1])
    with prune(model, 0.3, head_weights=weights) as pruning:
        model(**inputs)
    visual = pruning.scores.isfinite()
    expected = csrc_ref.score_tokens(
        layer.queries, layer.keys, weights, q_mask=pruning.query_mask, k_mask=visual, normalize="l2"
    )
    assert torch.allclose(pruning.scores[visual], expected[visual], atol=TOLERANCE)
    assert pruning.stats.method_options["ranking_layer"] == layer.index + 1


@pytest.mark.parametrize("name", HYBRIDS)
@torch.no_grad()
def test_key_norm_reads_the_same_layer_and_embeddings_stay_those_of_the_prompt(name):
    needs(name)
    model, inputs = tiny_model(name), batch(name, *prompts(name)["padded batch"])
    layer = Attention(model, inputs)
    with prune(model, 0.3, method="key_norm") as pruning:
        model(**inputs)
    visual = pruning.scores.isfinite()
    expected = layer.keys.norm(dim=-1).mean(dim=1)
    assert torch.allclose(pruning.scores[visual], expected[visual], atol=TOLERANCE)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"fastv", "hiprune", "pyramiddrop", "sparsevlm"}))
@torch.no_grad()
def test_cost_is_that_of_the_layers_before_and_only_for_methods_that_ask(method):
    model, inputs = tiny_model("qwen3_5"), batch("qwen3_5", *prompts("qwen3_5")["padded batch"])
    text, calls = dissect(model).text, []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, number=number: calls.append((number, args[0].shape[1])))
        for number, layer in enumerate(text.layers)
    ]
    # the middle layer of this model has no attention, so that VScan cannot drop tokens after it
    first_stage = {"second": 1} if method == "vscan" else {}
    with prune(model, 0.3, method=method, **options_of(method), **first_stage):
        model(**inputs)
    for hook in hooks:
        hook.remove()
    whole = inputs["input_ids"].shape[1]
    asks = method in ("hawk", "hawk_rope", "heed", "key_norm", "dart")
    assert [call for call in calls if call[1] == whole] == ([(0, whole)] if asks else [])
    assert [number for number, length in calls if length < whole] == list(range(len(text.layers)))


@torch.no_grad()
def test_a_call_that_collects_outputs_collects_those_of_the_kept_tokens_alone():
    model, inputs = tiny_model("qwen3_5_moe"), batch("qwen3_5_moe", *prompts("qwen3_5_moe")["one image"])
    del inputs["attention_mask"]
    with prune(model, 0.3, head_weights="uniform") as pruning:
        output = model(**inputs, output_hidden_states=True, output_router_logits=True)
    kept, depth = int(pruning.keep_mask.sum()), len(dissect(model).text.layers)
    assert [states.shape[1] for states in output.hidden_states] == [kept] * (depth + 1)
    assert [logits.shape[0] for logits in output.router_logits] == [kept] * depth


def test_ranking_leaves_no_gradient_and_changes_none():
    model, inputs = tiny_model("lfm2_vl"), batch("lfm2_vl", *prompts("lfm2_vl")["one image"])
    with prune(model, 0.3, head_weights="uniform") as pruning:
        model(**inputs).logits.sum().backward()
    pruned = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)

    class Same(METHODS["random"]):
        """Keeps what was kept before, without asking any layer."""

        name = "same"

        def score(self, view):
            return torch.where(kept_visual, 1.0, 0.0)

    visual = pruning.scores.isfinite()
    kept_visual = pruning.keep_mask[visual][None]
    with prune(model, 0.3, method=Same()) as again:
        model(**inputs).logits.sum().backward()
    assert torch.equal(again.keep_mask, pruning.keep_mask)
    for name, weight in model.named_parameters():
        if name in pruned:
            assert torch.allclose(weight.grad, pruned[name], atol=TOLERANCE, rtol=TOLERANCE), name
