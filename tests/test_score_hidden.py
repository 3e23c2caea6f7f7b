"""Scores from hidden states: the same as those of the queries and keys that the layer would have made."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map_only

import csrc_ref
from hawk_kernels import Layer, score_and_select, score_hidden, score_hidden_and_select
from hawk_kernels.backends.kernels import prepared
from hawk_kernels.backends.kernels import score_hidden as kernels_of_hidden
from tests.cases import DTYPES, NORMALIZATIONS, SCORE_TOLERANCE

BACKENDS = ("torch", "triton")


class HiddenCase:
    """Random hidden states and a random layer; NaN at all tokens that neither mask admits."""

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
        self.q_mask = torch.rand(batch, num_tokens, generator=generator) < text
        self.k_mask = (torch.rand(batch, num_tokens, generator=generator) < visual) & ~self.q_mask
        x = random(batch, num_tokens, hidden_size) * random(batch, num_tokens, 1).exp()
        self.x = x.masked_fill(~(self.q_mask | self.k_mask)[..., None], torch.nan).to(dtype)
        self.layer = Layer(
            norm_weight=(1 + 0.1 * random(hidden_size)).to(weight_dtype) if gamma else None,
            norm_eps=1e-6,
            wq=(random(num_heads * head_dim, hidden_size) / hidden_size**0.5).to(weight_dtype),
            wk=(random(num_key_value_heads * head_dim, hidden_size) / hidden_size**0.5).to(weight_dtype),
            bq=random(num_heads * head_dim).to(weight_dtype) if bias else None,
            bk=random(num_key_value_heads * head_dim).to(weight_dtype) if bias else None,
            num_key_value_heads=num_key_value_heads,
        )
        self.w = torch.rand(num_heads, generator=generator)

    def arguments(self, dtype=None, device=None):
        """`x`, the layer and `w`."""
        layer = self.layer if dtype is None else self.layer.to(dtype)
        layer = layer if device is None else layer.to(device)
        x, w = (tensor.to(device=device, dtype=dtype or tensor.dtype) for tensor in (self.x, self.w))
        return x, layer, w

    def change(self, name, changed):
        """Replace a tensor of this case or of its layer by what `changed` makes of it."""
        if name in Layer._fields:
            self.layer = self.layer._replace(**{name: changed(getattr(self.layer, name))})
        else:
            setattr(self, name, changed(getattr(self, name)))

    def options(self, device=None):
        return {"q_mask": self.q_mask.to(device), "k_mask": self.k_mask.to(device)}


def check(case, backend, device, r=0.3, rounding="floor", **options):
    """Parity with the explicit projections in float64; the selection is that of the returned scores, to the letter."""
    selection = score_hidden_and_select(
        *case.arguments(device=device), r, **case.options(device), rounding=rounding, backend=backend, **options
    )
    scores = score_hidden(*case.arguments(device=device), **case.options(device), backend=backend, **options)
    assert torch.equal(scores, selection.scores)
    mask, indices, scores = (tensor.cpu() for tensor in selection)
    expected = csrc_ref.score_hidden_and_select(*case.arguments(torch.float64), r, **case.options(), **options).scores
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(scores), finite)
    if finite.any():
        largest = expected[finite].abs().max().clamp(min=1e-30)
        error = ((scores.double() - expected)[finite].abs().max() / largest).item()
        assert error <= SCORE_TOLERANCE[case.x.dtype], f"relative error {error:.2e}"
    exact = csrc_ref.select_topk(scores, r, mask=case.k_mask, rounding=rounding)
    assert torch.equal(mask, exact.mask)
    assert torch.equal(indices, exact.indices)
    return selection


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_every_norm_and_dtype(backend, dtype, normalize, device):
    check(HiddenCase(dtype=dtype), backend, device, normalize=normalize)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [1, 40, 64, 72, 80, 96, 128, 256])
def test_every_head_dim(backend, head_dim, device):
    check(HiddenCase(head_dim=head_dim, num_tokens=25, dtype=torch.bfloat16), backend, device, normalize="l2")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(1, 1), (28, 4), (8, 8), (40, 1), (40, 40)], ids=str)
def test_every_ratio_of_heads(backend, heads, device):
    case = HiddenCase(num_tokens=25, num_heads=heads[0], num_key_value_heads=heads[1], head_dim=8)
    for normalize in (None, "l2"):
        check(case, backend, device, normalize=normalize)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 300, 2500])
def test_every_row_length(backend, num_tokens, device):
    check(HiddenCase(1, num_tokens, 24, 2, 1, 8, text=0.05, seed=1), backend, device, normalize="l2")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden_size", [1, 100, 130, 1030])
def test_every_hidden_size(backend, hidden_size, device):
    check(HiddenCase(1, 20, hidden_size, 2, 1, 8, dtype=torch.float16), backend, device, normalize="minmax")


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_meet_the_weights_together(backend, device):
    check(
        HiddenCase(batch=kernels_of_hidden.ROWS_PER_PROJECTION + 2, num_tokens=9, num_heads=2),
        backend,
        device,
        normalize="l2",
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_layer_may_leave_out(backend, device):
    for bias, gamma in ((False, True), (True, False), (False, False)):
        check(HiddenCase(bias=bias, gamma=gamma, num_tokens=20), backend, device, normalize="l2")
    check(HiddenCase(dtype=torch.bfloat16, weight_dtype=torch.float32, num_tokens=20), backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["floor", "ceil", "nearest"])
@pytest.mark.parametrize("r", [0.07, 1.0, 1, 5, 1000], ids=str)
def test_every_budget(backend, rounding, r, device):
    check(HiddenCase(num_tokens=20, num_heads=2), backend, device, r=r, rounding=rounding)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_text_score_the_bias_of_nothing(backend, device):
    case = HiddenCase(num_tokens=12)
    case.q_mask[0] = False
    selection = check(case, backend, device, normalize="l2")
    assert (selection.scores[0][case.k_mask[0].to(device)] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_visual_tokens_keep_nothing(backend, device):
    case = HiddenCase(num_tokens=12)
    case.k_mask[1] = False
    selection = check(case, backend, device, normalize="softmax")
    assert not selection.mask[1].any()
    assert (selection.indices[1] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_tokens_tie_wherever_they_stand(backend, device):
    case = HiddenCase(1, 41, 40, 4, 2, 8, dtype=torch.bfloat16)
    case.k_mask = ~case.q_mask
    case.x[0, case.k_mask[0]] = torch.linspace(-1, 2, 40, dtype=torch.bfloat16)
    selection = check(case, backend, device, r=5)
    assert selection.indices[0].tolist() == case.k_mask[0].nonzero().flatten()[:5].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend, device):
    case = HiddenCase(num_tokens=15)
    expected = check(case, backend, device, normalize="l2")
    case.x = case.x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    case.layer = case.layer._replace(
        wq=case.layer.wq.t().contiguous().t(),
        wk=torch.stack([case.layer.wk] * 2, dim=-1)[..., 0],
        bq=torch.stack([case.layer.bq] * 2, dim=-1)[..., 0],
    )
    got = check(case, backend, device, normalize="l2")
    assert torch.equal(got.mask, expected.mask)
    case.x = case.x[:1].expand(2, -1, -1)
    case.q_mask, case.k_mask = case.q_mask[:1].expand(2, -1), case.k_mask[:1].expand(2, -1)
    rows = check(case, backend, device, normalize="l2")
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
    case = HiddenCase(
        batch, num_tokens, hidden_size, group * num_key_value_heads, num_key_value_heads, head_dim, dtype, seed=seed
    )
    # a head whose logits nearly vanish has no direction in any precision
    check(case, backend, device, normalize=None if head_dim * hidden_size < 8 else normalize)


def test_it_is_the_projected_layer_scored(device):
    """Beside `score_and_select` on explicit queries and keys, which is how other code bases would do it."""
    case = HiddenCase(num_tokens=30)
    x, layer, w = case.arguments(device=device)
    gamma, eps, wq, bq, wk, bk, _ = layer
    h = torch.nn.functional.rms_norm(x, (x.shape[-1],), gamma, eps)
    q = torch.nn.functional.linear(h, wq, bq).unflatten(-1, (6, -1)).transpose(1, 2)
    k = torch.nn.functional.linear(h, wk, bk).unflatten(-1, (2, -1)).transpose(1, 2)
    expected = score_and_select(q, k, w, 0.3, normalize="l2", **case.options(device))
    got = score_hidden_and_select(*case.arguments(device=device), 0.3, **case.options(device), normalize="l2")
    assert torch.equal(got.mask, expected.mask)
    assert torch.equal(got.indices, expected.indices)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_in_float64_and_numbers_from_numpy(backend, device):
    case = HiddenCase(num_tokens=20)
    x, layer, w = case.arguments(device=device)
    options = case.options(device) | {"normalize": "l2", "backend": backend}
    expected = score_hidden(x, layer, w, **options)
    wide = layer._replace(
        norm_weight=layer.norm_weight.double(),
        norm_eps=np.float64(layer.norm_eps),
        bq=layer.bq.double(),
        bk=layer.bk.double(),
        num_key_value_heads=np.int64(layer.num_key_value_heads),
    )
    assert torch.equal(score_hidden(x, wide, w.double(), **options), expected)


def test_the_number_of_key_heads_follows_from_the_shapes():
    for heads in ((6, 1), (6, 2), (6, 6)):
        x, layer, w = (case := HiddenCase(num_tokens=20, num_heads=heads[0], num_key_value_heads=heads[1])).arguments()
        unsaid = layer._replace(num_key_value_heads=None)
        expected = score_hidden(x, layer, w, **case.options())
        assert torch.equal(score_hidden(x, unsaid, w, **case.options()), expected)


def test_unbatched_in_unbatched_out():
    case = HiddenCase(1, 20)
    x, *rest = case.arguments()
    masks = {name: mask[0] for name, mask in case.options().items()}
    row = score_hidden_and_select(x[0], *rest, 0.3, **masks)
    batched = score_hidden_and_select(x, *rest, 0.3, **case.options())
    assert all(torch.equal(one, many[0]) for one, many in zip(row, batched, strict=True))
    assert score_hidden(x[0], *rest, **masks).shape == (20,)


def test_no_rows_and_no_tokens():
    for batch, num_tokens in ((0, 5), (2, 0)):
        case = HiddenCase(batch, num_tokens)
        for backend in BACKENDS:
            selection = score_hidden_and_select(*case.arguments(), 0.3, **case.options(), backend=backend)
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
        case = HiddenCase(1, num_tokens, 24, 2, 1, 8, text=0.05)
        score_hidden_and_select(
            *case.arguments(device=device), 0.3, **case.options(device), normalize="l2", backend="triton"
        )
    assert len(launches) == 3


def test_a_launch_leaves_its_counters_at_zero(monkeypatch, device):
    counters = torch.zeros(1024, dtype=torch.int32, device=device)
    monkeypatch.setattr(prepared, "launch_counters", lambda count, device: counters)
    for num_tokens in (20, 2500):
        case = HiddenCase(1, num_tokens, 24, 2, 1, 8, text=0.05)
        check(case, "triton", device, normalize="l2")
        assert counters.eq(0).all()


def test_outputs_carry_no_grad_and_compile_without_breaks():
    case = HiddenCase(1, 20)
    x, layer, w = case.arguments()
    for tensor in (x, w, *(field for field in layer if isinstance(field, torch.Tensor))):
        tensor.requires_grad_()
    options = case.options()
    torch._dynamo.reset()

    def run(x, layer, mask):
        return score_hidden_and_select(x, layer, w, 0.3, **options | {"k_mask": mask}, normalize="l2")

    def run_parts(x, parts, mask):
        return run(x, Layer(*parts), mask)

    for function, fields in ((run, layer), (run_parts, tuple(layer))):
        compiled = torch.compile(function, fullgraph=True, backend="eager")(x, fields, case.k_mask)
        for got, expected in zip(compiled, run(x, layer, case.k_mask), strict=True):
            assert torch.equal(got, expected)
            assert not got.requires_grad


def test_fake_tensors_have_the_shapes(device):
    case = HiddenCase(2, 20)
    with torch._subclasses.FakeTensorMode() as mode:
        x, layer, w, options = tree_map_only(torch.Tensor, mode.from_tensor, (*case.arguments(), case.options()))
        selection = score_hidden_and_select(x, layer, w, 0.3, **options)
    assert [tuple(tensor.shape) for tensor in selection] == [(2, 20), (2, 6), (2, 20)]
    assert [tensor.dtype for tensor in selection] == [torch.bool, torch.int64, torch.float32]


def test_autocast_changes_nothing():
    case = HiddenCase(1, 20)
    expected = score_hidden(*case.arguments(), **case.options())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score_hidden(*case.arguments(), **case.options()), expected)


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
        ({"num_key_value_heads": 4}, ValueError, "num_key_value_heads: expected a divisor of w's 6 heads, .*got 4;"),
        ({"num_key_value_heads": 3}, ValueError, r"wk: expected shape \[48, 48\] \(3 heads of 16\), got \[32, 48\]"),
        ({"num_key_value_heads": 2.0}, TypeError, "num_key_value_heads: expected a divisor .*, got float; the model's"),
        (
            {"num_key_value_heads": None, "wk": torch.zeros(40, 48)},
            ValueError,
            r"layer.wk: expected outputs of a number of heads that divides w's 6, each of 16 .*got shape \[40, 48\]",
        ),
        (
            {"num_key_value_heads": None, "wk": torch.zeros(64, 48), "bk": None},
            ValueError,
            r"layer.wk: expected outputs of a number of heads that divides w's 6, each of 16 .*got shape \[64, 48\]",
        ),
        (
            {"num_key_value_heads": None, "wk": torch.zeros(8, 48)},
            ValueError,
            r"layer.wk: expected outputs of a number of heads that divides w's 6, each of 16 .*got shape \[8, 48\]",
        ),
        ({"wk": None}, TypeError, "layer.wk: expected a torch.Tensor, got NoneType"),
        ({"layer": (None, 1e-6)}, TypeError, r"layer: expected a hawk_kernels.Layer, got tuple; use Layer.of\(norm, q"),
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
    case = HiddenCase()
    x, layer, w = case.arguments()
    layer = layer._replace(**{name: value for name, value in change.items() if name in Layer._fields})
    rest = {name: value for name, value in change.items() if name not in Layer._fields}
    with pytest.raises(error, match=message):
        score_hidden_and_select(**{"x": x, "layer": layer, "w": w, "r": 0.3} | case.options() | rest)
