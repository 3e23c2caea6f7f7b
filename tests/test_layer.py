"""`Layer`: what it reads from modules, what it refuses to read, and that scores by it are those of the model."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hawk_kernels import Layer, score_and_select, score_hidden, score_hidden_and_select
from tests.tiny_families import tiny_model

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 32, 4, 2, 8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def projections(bias=False, dtype=torch.float32):
    torch.manual_seed(0)
    return (nn.Linear(HIDDEN, heads * HEAD_DIM, bias=bias, dtype=dtype) for heads in (HEADS, KV_HEADS))


def with_random_weight(norm, dtype=torch.float32):
    torch.manual_seed(1)
    nn.init.normal_(norm.weight, std=0.3)
    return norm.to(dtype)


def masks(num_tokens=20):
    tokens = torch.arange(num_tokens).unsqueeze(0)
    return {"q_mask": tokens >= 14, "k_mask": (tokens > 2) & (tokens < 14)}


def assert_scores_as_its_modules(layer, norm, query, key):
    """Scores from hidden states agree with those of the queries and keys that the modules make, in float32."""
    torch.manual_seed(2)
    x, w = torch.randn(1, 20, HIDDEN), torch.rand(HEADS)
    with torch.no_grad():
        h = norm.float()(x)
        q, k = (m.float()(h).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for m in (query, key))
    expected = score_and_select(q, k, w, 5, normalize="l2", **masks())
    got = score_hidden_and_select(x, layer, w, 5, normalize="l2", **masks())
    assert torch.equal(got.mask, expected.mask)
    assert torch.allclose(got.scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, nn.RMSNorm])
def test_reads_the_norms_of_the_field(kind, bias, dtype):
    norm = kind(HIDDEN, eps=1e-5)
    norm = with_random_weight(norm, dtype)
    query, key = projections(bias, dtype)
    layer = Layer.of(norm, query, key)
    assert layer.norm_eps == 1e-5
    # one plus the parameter, which a half-precision sum would round
    factor = 1 + norm.weight.float() if kind is GemmaRMSNorm else norm.weight
    assert torch.equal(layer.norm_weight, factor)
    assert layer.wq is query.weight
    assert layer.wk is key.weight
    assert layer.bq is query.bias
    assert layer.bk is key.bias
    assert layer.num_key_value_heads is None
    assert Layer.of(norm, query, key, 2).num_key_value_heads == 2
    assert_scores_as_its_modules(layer, norm, query, key)


def test_reads_a_layer_of_qwen2_5_vl():
    model = tiny_model("qwen2_5_vl")
    decoder = model.model.language_model.layers[0]
    attention = decoder.self_attn
    layer = Layer.of(decoder.input_layernorm, attention.q_proj, attention.k_proj)
    assert layer.bq is attention.q_proj.bias is not None
    config = model.config.get_text_config()
    torch.manual_seed(3)
    x, w = torch.randn(1, 20, config.hidden_size), torch.rand(config.num_attention_heads)
    with torch.no_grad():
        h = decoder.input_layernorm(x)
        q, k = (
            projection(h).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj)
        )
    expected = score_and_select(q, k, w, 0.3, **masks())
    got = score_hidden_and_select(x, layer, w, 0.3, **masks())
    assert torch.equal(got.mask, expected.mask)
    assert torch.allclose(got.scores, expected.scores, atol=1e-5)


def test_moves_to_another_dtype_or_device():
    query, key = projections(bias=False)
    layer = Layer.of(with_random_weight(LlamaRMSNorm(HIDDEN)), query, key, 2)
    half, elsewhere = layer.to(torch.bfloat16), layer.to(torch.device("meta"))
    assert {half.norm_weight.dtype, half.wq.dtype, half.wk.dtype} == {torch.bfloat16}
    assert elsewhere.wq.is_meta
    assert (half.bq, half.bk, half.norm_eps, half.num_key_value_heads) == (None, None, 1e-6, 2)


def test_reading_leaves_no_trace():
    norm, (query, key) = with_random_weight(GemmaRMSNorm(HIDDEN)), projections(bias=True)
    before = [tensor.clone() for module in (norm, query, key) for tensor in module.state_dict().values()]
    state = torch.random.get_rng_state()
    layer = Layer.of(norm, query, key)
    assert torch.equal(torch.random.get_rng_state(), state)
    after = [tensor for module in (norm, query, key) for tensor in module.state_dict().values()]
    assert all(map(torch.equal, before, after))
    assert all(tensor.grad is None for tensor in (layer.wq, layer.wk, norm.weight))


class OtherEpsilon(LlamaRMSNorm):
    """Computes with an epsilon that is not the one it shows."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)


class Centred(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class Quantized(nn.Linear):
    """Stands for a projection whose weight is not what its forward multiplies by."""


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output)
    return module


def parametrized(linear):
    return nn.utils.parametrizations.orthogonal(linear)


NORM = LlamaRMSNorm(HIDDEN)
QUERY, KEY = projections()
REFUSED = {
    "a centred norm": (dict(norm=Centred(HIDDEN)), ValueError, "norm: expected an RMSNorm without hooks.*got Centred"),
    "a LayerNorm": (
        dict(norm=nn.LayerNorm(HIDDEN)),
        ValueError,
        "norm: .*got LayerNorm, which computes something",
    ),
    "another epsilon": (dict(norm=OtherEpsilon(HIDDEN)), ValueError, "norm: .*got OtherEpsilon.*; pass Layer.norm_wei"),
    "no norm": (dict(norm=nn.Identity()), ValueError, "norm: .*got Identity.* or has no weight and epsilon to read"),
    "no epsilon": (
        dict(norm=nn.RMSNorm(HIDDEN)),
        ValueError,
        "norm: .*got RMSNorm.* has no weight and epsilon",
    ),
    "a hooked norm": (dict(norm=hooked(LlamaRMSNorm(HIDDEN))), ValueError, "norm: expected an RMSNorm without hooks"),
    "an offloaded norm": (dict(norm=LlamaRMSNorm(HIDDEN).to("meta")), ValueError, "norm: expected an RMSNorm"),
    "quantised": (dict(q_proj=Quantized(4, 4)), TypeError, "q_proj: expected a torch.nn.Linear, got Quantized; deq"),
    "adapted": (dict(k_proj=nn.Sequential(KEY)), TypeError, "k_proj: .*got Sequential; .*merge an adapter into its"),
    "no module": (dict(q_proj=QUERY.weight), TypeError, "q_proj: expected a torch.nn.Linear, got Parameter; "),
    "hooks": (dict(q_proj=hooked(nn.Linear(4, 4))), ValueError, "q_proj: expected a torch.nn.Linear without hooks"),
    "parametrized": (
        dict(k_proj=parametrized(nn.Linear(4, 4))),
        (TypeError, ValueError),
        "k_proj: expected a torch.nn",
    ),
    "float64": (
        dict(k_proj=nn.Linear(4, 4).double()),
        ValueError,
        "k_proj: expected a float32.* of torch.float64 on",
    ),
    "offloaded": (dict(q_proj=nn.Linear(4, 4, device="meta")), ValueError, "q_proj: .* on meta; load the weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_a_remedy(name):
    change, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        Layer.of(**{"norm": NORM, "q_proj": QUERY, "k_proj": KEY} | change)


@pytest.mark.parametrize(("count", "message"), [(4, r"layer.wk: expected shape \[32, 32\]"), (3, "a divisor of w's 4")])
def test_a_number_of_key_heads_must_agree_with_the_shapes(count, message):
    layer = Layer.of(NORM, QUERY, KEY, count)
    with pytest.raises(ValueError, match=message):
        score_hidden(torch.randn(1, 20, HIDDEN), layer, torch.ones(HEADS), **masks())
