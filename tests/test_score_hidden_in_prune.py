"""`prune` scores by hidden states wherever that is the same as projecting, and projects where it is not."""

import pytest
import torch
from torch import nn

from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.projections import LayerProjections
from hawk_kernels.layer import recognised_rms_norm
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import END_OF_TURN, Picture

# what the first attention layer has that hidden states alone cannot give
NOT_LINEAR = {"qwen3_vl": "norms of single heads", "kimi_k25": "latent attention", "qwen3_5": "norms of single heads"}
LINEAR = ("qwen2_5_vl", "qwen2_vl", "llava", "internvl", "paligemma", "llava_onevision")


def kept(model, inputs, **options):
    with torch.no_grad(), prune(model, 0.3, head_weights="uniform", **options) as pruning:
        model(**inputs)
    return pruning


def questions(name):
    one, other = (BY_NAME[name].picture or size for size in (Picture(3, 3), Picture(2, 3)))
    return batch(name, [11, one, other, 12, 13, END_OF_TURN], [14, other, 15, END_OF_TURN])


def without_the_short_cut(monkeypatch):
    from hawk_kernels.hf import projections

    for kind in (LayerProjections, projections.SeparateProjections):
        monkeypatch.setattr(kind, "plain", lambda self: None)


@pytest.mark.parametrize("options", [{}, {"budget": "per_image"}, {"normalize": None}], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_both_ways_agree(monkeypatch, name, options):
    model, inputs = tiny_model(name), questions(name)
    assert dissect(model).projections.plain() is not None
    quick = kept(model, inputs, **options)
    without_the_short_cut(monkeypatch)
    slow = kept(model, inputs, **options)
    assert torch.equal(quick.keep_mask, slow.keep_mask)
    assert torch.allclose(quick.scores, slow.scores, atol=1e-5)


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_layers_that_are_not_linear_are_projected(name):
    assert dissect(tiny_model(name)).projections.plain() is None, NOT_LINEAR[name]


class Doubled(nn.Linear):
    """Stands for a quantised or adapted projection: its weight is not what its forward does."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_projections_that_do_more_than_multiply_are_called():
    model = tiny_model("qwen2_5_vl")
    parts = dissect(model)
    attention = parts.text.layers[0].self_attn
    plain = attention.k_proj
    handle = plain.register_forward_hook(lambda module, args, output: 2 * output)
    assert parts.projections.plain() is None
    handle.remove()
    assert parts.projections.plain() is not None
    doubled = Doubled(plain.in_features, plain.out_features)
    doubled.load_state_dict(plain.state_dict())
    attention.k_proj = doubled
    assert dissect(model).projections.plain() is None
    attention.k_proj = plain


class Shifted(nn.Module):
    """RMSNorm as Gemma writes it: the parameter is the factor less one."""

    def __init__(self, size):
        super().__init__()
        self.eps = 1e-6
        self.weight = nn.Parameter(0.1 * torch.randn(size))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class Centred(Shifted):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


def test_norms_are_recognised_by_what_they_do():
    assert recognised_rms_norm(nn.RMSNorm(8, eps=1e-5)) == (0.0, 1e-5)
    assert recognised_rms_norm(nn.RMSNorm(8, eps=1e-5).bfloat16()) == (0.0, 1e-5)
    assert recognised_rms_norm(Shifted(8)) == (1.0, 1e-6)
    assert recognised_rms_norm(Centred(8)) is None
    assert recognised_rms_norm(nn.LayerNorm(8)) is None
    assert recognised_rms_norm(nn.Identity()) is None
    assert recognised_rms_norm(nn.RMSNorm(8, eps=1e-5, device="meta")) is None


def test_half_precision_models_score_nearer_to_the_exact_ones(monkeypatch):
    """Projections round to bfloat16; hidden states meet queries in float32."""
    model, inputs = tiny_model("qwen2_5_vl").to(torch.bfloat16), questions("qwen2_5_vl")
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    quick = kept(model, inputs, normalize=None)
    rounded = {}
    for name, parameter in model.named_parameters():
        rounded[name] = parameter.detach().float()
    with monkeypatch.context() as patched:
        without_the_short_cut(patched)
        slow = kept(model, inputs, normalize=None)
        embeds = []
        handle = dissect(model).text.register_forward_pre_hook(
            lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
        exact_model = tiny_model("qwen2_5_vl").double()
        exact_model.load_state_dict(rounded)
        exact_layer = dissect(exact_model).projections
    states = exact_layer.normalize(embeds[0].double())
    queries, keys = exact_layer.queries(states), exact_layer.keys(states).repeat_interleave(2, dim=2)
    seen = quick.query_mask.double()
    mean = torch.einsum("bthd,bt->bhd", queries, seen) / seen.sum(1)[:, None, None]
    exact = torch.einsum("bhd,bthd->bt", mean, keys) / queries.shape[2] * queries.shape[3] ** -0.5
    visual = quick.scores > -torch.inf
    errors = [(pruning.scores - exact)[visual].abs().max() for pruning in (quick, slow)]
    assert errors[0] < 1e-5 < errors[1]
