"""Scores from hidden states: the same as those of the queries and keys that the layer would have made."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import csrc_ref
from hawk_kernels import score_and_select, score_hidden, score_hidden_and_select
from hawk_kernels.backends.kernels import score_hidden as kernels_of_hidden
from tests.cases import DTYPES, NORMALIZATIONS, SCORE_TOLERANCE

BACKENDS = ("torch", "triton")


class Layer:
    """Random hidden states and weights; NaN wherever neither mask says that anybody may look."""

    def __init__(
        self,
        batch=2,
        num_tokens=60,
        hidden_size=48,
        num_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        dtype=torch.float32,
        weight_dtype=None,
        bias=True,
        gamma=True,
        text=0.3,
        visual=0.6,
        seed=0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator)

        weight_dtype = weight_dtype or dtype
        self.num_key_value_heads = num_key_value_heads
        self.q_mask = torch.rand(batch, num_tokens, generator=generator) < text
        self.k_mask = (torch.rand(batch, num_tokens, generator=generator) < visual) & ~self.q_mask
        x = random(batch, num_tokens, hidden_size) * random(batch, num_tokens, 1).exp()
        self.x = x.masked_fill(~(self.q_mask | self.k_mask)[..., None], torch.nan).to(dtype)
        self.norm_weight = (1 + 0.1 * random(hidden_size)).to(weight_dtype) if gamma else None
        self.eps = 1e-6
        self.wq = (random(num_heads * head_dim, hidden_size) / hidden_size**0.5).to(weight_dtype)
        self.wk = (random(num_key_value_heads * head_dim, hidden_size) / hidden_size**0.5).to(weight_dtype)
        self.bq = random(num_heads * head_dim).to(weight_dtype) if bias else None
        self.bk = random(num_key_value_heads * head_dim).to(weight_dtype) if bias else None
        self.w = torch.rand(num_heads, generator=generator)

    def arguments(self, dtype=None, device=None):
        plain = (self.x, self.norm_weight, self.eps, self.wq, self.bq, self.wk, self.bk, self.w)
        return tuple(
            value.to(device=device, dtype=dtype or value.dtype) if isinstance(value, torch.Tensor) else value
            for value in plain
        )

    def options(self, device=None):
        return {
            "num_key_value_heads": self.num_key_value_heads,
            "q_mask": self.q_mask.to(device),
            "k_mask": self.k_mask.to(device),
        }


def check(layer, backend, device, r=0.3, rounding="floor", **options):
    """Parity with the explicit projections in float64; the selection is that of the returned scores, to the letter."""
    selection = score_hidden_and_select(
        *layer.arguments(device=device), r, **layer.options(device), rounding=rounding, backend=backend, **options
    )
    scores = score_hidden(*layer.arguments(device=device), **layer.options(device), backend=backend, **options)
    assert torch.equal(scores, selection.scores)
    mask, indices, scores = (tensor.cpu() for tensor in selection)
    expected = csrc_ref.score_hidden_and_select(*layer.arguments(torch.float64), r, **layer.options(), **options).scores
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(scores), finite)
    if finite.any():
        largest = expected[finite].abs().max().clamp(min=1e-30)
        error = ((scores.double() - expected)[finite].abs().max() / largest).item()
        assert error <= SCORE_TOLERANCE[layer.x.dtype], f"relative error {error:.2e}"
    exact = csrc_ref.select_topk(scores, r, mask=layer.k_mask, rounding=rounding)
    assert torch.equal(mask, exact.mask)
    assert torch.equal(indices, exact.indices)
    return selection


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_every_norm_and_dtype(backend, dtype, normalize, device):
    check(Layer(dtype=dtype), backend, device, normalize=normalize)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [1, 40, 64, 72, 80, 96, 128, 256])
def test_every_head_dim(backend, head_dim, device):
    check(Layer(head_dim=head_dim, num_tokens=25, dtype=torch.bfloat16), backend, device, normalize="l2")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(1, 1), (28, 4), (8, 8), (40, 1), (40, 40)], ids=str)
def test_every_ratio_of_heads(backend, heads, device):
    layer = Layer(num_tokens=25, num_heads=heads[0], num_key_value_heads=heads[1], head_dim=8)
    for normalize in (None, "l2"):
        check(layer, backend, device, normalize=normalize)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 300, 2500])
def test_every_row_length(backend, num_tokens, device):
    check(Layer(1, num_tokens, 24, 2, 1, 8, text=0.05, seed=1), backend, device, normalize="l2")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden_size", [1, 100, 130, 1030])
def test_every_hidden_size(backend, hidden_size, device):
    check(Layer(1, 20, hidden_size, 2, 1, 8, dtype=torch.float16), backend, device, normalize="minmax")


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_meet_the_weights_together(backend, device):
    check(
        Layer(batch=kernels_of_hidden.ROWS_PER_PROJECTION + 2, num_tokens=9, num_heads=2),
        backend,
        device,
        normalize="l2",
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_layer_may_leave_out(backend, device):
    for bias, gamma in ((False, True), (True, False), (False, False)):
        check(Layer(bias=bias, gamma=gamma, num_tokens=20), backend, device, normalize="l2")
    check(Layer(dtype=torch.bfloat16, weight_dtype=torch.float32, num_tokens=20), backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["floor", "ceil"])
@pytest.mark.parametrize("r", [0.07, 1.0, 1, 5, 1000], ids=str)
def test_every_budget(backend, rounding, r, device):
    check(Layer(num_tokens=20, num_heads=2), backend, device, r=r, rounding=rounding)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_text_score_the_bias_of_nothing(backend, device):
    layer = Layer(num_tokens=12)
    layer.q_mask[0] = False
    selection = check(layer, backend, device, normalize="l2")
    assert (selection.scores[0][layer.k_mask[0].to(device)] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_visual_tokens_keep_nothing(backend, device):
    layer = Layer(num_tokens=12)
    layer.k_mask[1] = False
    selection = check(layer, backend, device, normalize="softmax")
    assert not selection.mask[1].any()
    assert (selection.indices[1] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_tokens_tie_wherever_they_stand(backend, device):
    layer = Layer(1, 41, 40, 4, 2, 8, dtype=torch.bfloat16)
    layer.k_mask = ~layer.q_mask
    layer.x[0, layer.k_mask[0]] = torch.linspace(-1, 2, 40, dtype=torch.bfloat16)
    selection = check(layer, backend, device, r=5)
    assert selection.indices[0].tolist() == layer.k_mask[0].nonzero().flatten()[:5].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, device):
    layer = Layer(num_tokens=15)
    expected = check(layer, backend, device, normalize="l2")
    layer.x = layer.x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    layer.wq = layer.wq.t().contiguous().t()
    layer.wk = torch.stack([layer.wk] * 2, dim=-1)[..., 0]
    layer.bq = torch.stack([layer.bq] * 2, dim=-1)[..., 0]
    got = check(layer, backend, device, normalize="l2")
    assert torch.equal(got.mask, expected.mask)
    layer.x = layer.x[:1].expand(2, -1, -1)
    layer.q_mask, layer.k_mask = layer.q_mask[:1].expand(2, -1), layer.k_mask[:1].expand(2, -1)
    rows = check(layer, backend, device, normalize="l2")
    assert torch.equal(rows.mask[0], rows.mask[1])


@settings(max_examples=15)
@given(
    batch=st.integers(1, 3),
    num_tokens=st.integers(1, 40),
    hidden_size=st.integers(1, 70),
    group=st.integers(1, 3),
    num_key_value_heads=st.integers(1, 3),
    head_dim=st.integers(1, 20),
    normalize=st.sampled_from(NORMALIZATIONS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**20),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(
    backend, batch, num_tokens, hidden_size, group, num_key_value_heads, head_dim, normalize, dtype, seed, device
):
    layer = Layer(
        batch, num_tokens, hidden_size, group * num_key_value_heads, num_key_value_heads, head_dim, dtype, seed=seed
    )
    # a head whose logits nearly vanish has no direction in any precision
    check(layer, backend, device, normalize=None if head_dim * hidden_size < 8 else normalize)


def test_it_is_the_projected_layer_scored(device):
    """Beside `score_and_select` on explicit queries and keys, which is how other code bases would do it."""
    layer = Layer(num_tokens=30)
    x, gamma, eps, wq, bq, wk, bk, w = layer.arguments(device=device)
    h = torch.nn.functional.rms_norm(x, (x.shape[-1],), gamma, eps)
    q = torch.nn.functional.linear(h, wq, bq).unflatten(-1, (6, -1)).transpose(1, 2)
    k = torch.nn.functional.linear(h, wk, bk).unflatten(-1, (2, -1)).transpose(1, 2)
    masks = {name: mask for name, mask in layer.options(device).items() if name.endswith("mask")}
    expected = score_and_select(q, k, w, 0.3, normalize="l2", **masks)
    got = score_hidden_and_select(*layer.arguments(device=device), 0.3, **layer.options(device), normalize="l2")
    assert torch.equal(got.mask, expected.mask)
    assert torch.equal(got.indices, expected.indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_in_float64_and_numbers_from_numpy(backend, device):
    layer = Layer(num_tokens=20)
    x, gamma, eps, wq, bq, wk, bk, w = layer.arguments(device=device)
    options = layer.options(device) | {"normalize": "l2", "backend": backend}
    expected = score_hidden(x, gamma, eps, wq, bq, wk, bk, w, **options)
    wide = [vector.double() for vector in (gamma, bq, bk, w)]
    options["num_key_value_heads"] = np.int64(options["num_key_value_heads"])
    got = score_hidden(x, wide[0], np.float64(eps), wq, wide[1], wk, wide[2], wide[3], **options)
    assert torch.equal(got, expected)


def test_unbatched_in_unbatched_out():
    layer = Layer(1, 20)
    x, *rest = layer.arguments()
    masks = {name: mask[0] for name, mask in layer.options().items() if name.endswith("mask")}
    row = score_hidden_and_select(x[0], *rest, 0.3, num_key_value_heads=2, **masks)
    batched = score_hidden_and_select(x, *rest, 0.3, **layer.options())
    assert all(torch.equal(one, many[0]) for one, many in zip(row, batched, strict=True))
    assert score_hidden(x[0], *rest, num_key_value_heads=2, **masks).shape == (20,)


def test_no_rows_and_no_tokens():
    for batch, num_tokens in ((0, 5), (2, 0)):
        layer = Layer(batch, num_tokens)
        for backend in BACKENDS:
            selection = score_hidden_and_select(*layer.arguments(), 0.3, **layer.options(), backend=backend)
            assert selection.mask.shape == (batch, num_tokens)


def test_one_launch(monkeypatch, device):
    launches = []
    kernel = kernels_of_hidden._score_hidden_kernel

    class Counting:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels_of_hidden, "_score_hidden_kernel", Counting())
    for num_tokens in (1, 100, 2500):
        layer = Layer(1, num_tokens, 24, 2, 1, 8, text=0.05)
        score_hidden_and_select(
            *layer.arguments(device=device), 0.3, **layer.options(device), normalize="l2", backend="triton"
        )
    assert len(launches) == 3


def test_a_launch_leaves_its_counters_at_zero(monkeypatch, device):
    counters = torch.zeros(1024, dtype=torch.int32, device=device)
    monkeypatch.setattr(kernels_of_hidden, "launch_counters", lambda count, device: counters)
    for num_tokens in (20, 2500):
        layer = Layer(1, num_tokens, 24, 2, 1, 8, text=0.05)
        check(layer, "triton", device, normalize="l2")
        assert counters.eq(0).all()


def test_outputs_carry_no_grad_and_compile_without_breaks():
    layer = Layer(1, 20)
    arguments = [value.requires_grad_() if isinstance(value, torch.Tensor) else value for value in layer.arguments()]
    options = layer.options()
    torch._dynamo.reset()

    def run(x, mask):
        return score_hidden_and_select(x, *arguments[1:], 0.3, **options | {"k_mask": mask}, normalize="l2")

    compiled = torch.compile(run, fullgraph=True, backend="eager")(arguments[0], layer.k_mask)
    for got, expected in zip(compiled, run(arguments[0], layer.k_mask), strict=True):
        assert torch.equal(got, expected)
        assert not got.requires_grad


def test_fake_tensors_have_the_shapes(device):
    layer = Layer(2, 20)
    with torch._subclasses.FakeTensorMode() as mode:
        arguments = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in layer.arguments()]
        options = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in layer.options().items()}
        selection = score_hidden_and_select(*arguments, 0.3, **options)
    assert [tuple(tensor.shape) for tensor in selection] == [(2, 20), (2, 6), (2, 20)]
    assert [tensor.dtype for tensor in selection] == [torch.bool, torch.int64, torch.float32]


def test_autocast_changes_nothing():
    layer = Layer(1, 20)
    expected = score_hidden(*layer.arguments(), **layer.options())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score_hidden(*layer.arguments(), **layer.options()), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list; use torch.as_tensor"),
        ({"x": torch.zeros(2, 60, 48).double()}, TypeError, "x: expected dtype float32, .* got torch.float64; use"),
        ({"x": torch.zeros(48)}, ValueError, r"x: expected \[B, T, C\] or \[T, C\], got shape \[48\]"),
        ({"x": torch.zeros(2, 60, 0)}, ValueError, "x: expected hidden states of at least one channel"),
        ({"wq": torch.zeros(96, 47)}, ValueError, r"wq: expected shape \['any', 48\] .* got \[96, 47\]; see"),
        ({"wq": torch.zeros(95, 48)}, ValueError, r"wq: expected a multiple of w's 6 heads as outputs, got shape"),
        ({"wk": torch.zeros(96, 48)}, ValueError, r"wk: expected shape \[32, 48\] \(2 heads of 16\), got \[96, 48\]"),
        ({"bq": torch.zeros(1)}, ValueError, r"bq: expected shape \[96\] \(or None\), got \[1\]"),
        ({"bk": torch.zeros(32).long()}, TypeError, "bk: expected a floating point dtype, got torch.int64; use"),
        ({"norm_weight": torch.zeros(2, 48)}, ValueError, r"norm_weight: expected shape \[48\] \(or None\), got"),
        ({"w": torch.zeros(2, 3)}, ValueError, r"w: expected shape \['any'\] \(one weight a head\), got \[2, 3\]"),
        ({"wq": torch.zeros(96, 48, device="meta")}, ValueError, "wq: expected device cpu as x, got meta; use"),
        ({"norm_eps": "small"}, TypeError, "norm_eps: expected a float, got str; 1e-6 is usual"),
        ({"norm_eps": -1.0}, ValueError, "norm_eps: expected a finite number of at least 0, got -1.0"),
        ({"num_key_value_heads": 4}, ValueError, "num_key_value_heads: expected a divisor of w's 6 heads, got 4"),
        ({"num_key_value_heads": 2.0}, TypeError, "num_key_value_heads: expected an int, got float; the config"),
        ({"q_mask": torch.ones(2, 59).bool()}, ValueError, r"q_mask: expected shape \[2, 60\] \(one entry a token\)"),
        ({"k_mask": torch.ones(2, 60)}, TypeError, "k_mask: expected dtype torch.bool, got torch.float32; use"),
        ({"normalize": "l1"}, ValueError, "normalize: expected None, 'l2', 'softmax' or 'minmax', got 'l1'"),
        ({"rounding": "up"}, ValueError, "rounding: expected 'floor'"),
        ({"scale": "big"}, TypeError, "scale: expected a float or None"),
        ({"backend": "cuda"}, ValueError, "backend: expected None, 'triton' or 'torch', got 'cuda'"),
        ({"wq": torch.zeros(96, 48).double()}, TypeError, "wq: expected dtype float32, .* got torch.float64; use"),
        ({"q_mask": None}, TypeError, "q_mask: expected a torch.Tensor, got NoneType"),
        ({"r": 0.0}, ValueError, r"r: expected a float in \(0, 1\]"),
        ({"r": 0}, ValueError, "r: expected a float"),
    ],
)
def test_errors_say_what_came_and_what_to_do(change, error, message):
    layer = Layer()
    names = ("x", "norm_weight", "norm_eps", "wq", "bq", "wk", "bk", "w")
    arguments = dict(zip(names, layer.arguments(), strict=True)) | {"r": 0.3} | layer.options() | change
    with pytest.raises(error, match=message):
        score_hidden_and_select(**arguments)
