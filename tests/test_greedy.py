"""Greedy selection of tokens that differ: parity with the literal loops, order, ties, masks, shapes, errors."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import greedy as greedy_bench
from csrc_ref import greedy_dpp as reference_dpp
from csrc_ref import greedy_max_min as reference_max_min
from hawk_kernels import greedy_dpp, greedy_max_min, select_topk
from hawk_kernels.backends.eager import greedy as eager_greedy

FUNCTIONS = ("max_min", "dpp")


def select(function, features, quality, r, **options):
    if function == "max_min":
        return greedy_max_min(features, r, **options)
    return greedy_dpp(features, quality, r, **options)


def literal(function, features, quality, r, **options):
    if function == "max_min":
        return reference_max_min(features, r, **options)
    return reference_dpp(features, quality, r, **options)


@st.composite
def problems(draw):
    """Tokens with duplicates, zeros and entries that are not finite, quality, a mask or none, and a budget."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batch, num_tokens, dim = draw(st.integers(1, 3)), draw(st.integers(1, 19)), draw(st.integers(1, 24))
    features = torch.randn(batch, num_tokens, dim, generator=generator)
    quality = torch.rand(batch, num_tokens, generator=generator)
    for kind in draw(st.lists(st.sampled_from(["same", "zero", "nan", "inf", "no quality"]), max_size=4)):
        row, token, other = (draw(st.integers(0, n - 1)) for n in (batch, num_tokens, num_tokens))
        if kind == "same":
            features[row, token] = features[row, other]
            quality[row, token] = quality[row, other]
        elif kind == "no quality":
            quality[row, token] = draw(st.sampled_from([0.0, torch.nan]))
        else:
            features[row, token] = {"zero": 0.0, "nan": torch.nan, "inf": torch.inf}[kind]
    mask = torch.rand(batch, num_tokens, generator=generator) < 0.7 if draw(st.booleans()) else None
    r = draw(st.one_of(st.floats(0.01, 1.0), st.integers(1, num_tokens)))
    return features, quality, r, mask, draw(st.sampled_from(["floor", "ceil", "nearest"]))


def check_parity(function, problem, backend, device):
    features, quality, r, mask, rounding = problem
    options = {"mask": None if mask is None else mask.to(device), "rounding": rounding, "backend": backend}
    found = select(function, features.to(device), quality.to(device), r, **options)
    expected = literal(function, features, quality, r, mask=mask, rounding=rounding)
    assert torch.equal(found.mask.cpu(), expected.mask)
    assert torch.equal(found.indices.cpu(), expected.indices)
    assert torch.allclose(found.scores.cpu(), expected.scores, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("function", FUNCTIONS)
@given(problem=problems())
def test_parity_with_the_literal_loop(function, problem):
    check_parity(function, problem, "torch", "cpu")


@pytest.mark.parametrize("function", FUNCTIONS)
@settings(max_examples=30)
@given(problem=problems())
def test_parity_of_the_kernel_with_the_literal_loop(function, device, problem):
    check_parity(function, problem, "triton", device)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_parity_of_the_kernel_with_torch_at_longer_rows(function, device):
    features, quality = torch.randn(2, 300, 24, device=device), torch.rand(2, 300, device=device)
    mask = torch.arange(300, device=device) < torch.tensor([[300], [170]], device=device)
    found, expected = (
        select(function, features, quality, 0.12, mask=mask, backend=backend) for backend in ("triton", "torch")
    )
    assert torch.equal(found.indices, expected.indices)
    assert torch.allclose(found.scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
@given(problem=problems())
def test_scores_rank_the_kept_tokens_first(function, problem):
    features, quality, r, mask, rounding = problem
    found = select(function, features, quality, r, mask=mask, rounding=rounding)
    by_score = select_topk(found.scores, r, mask=mask, rounding=rounding)
    assert torch.equal(found.mask, by_score.mask)
    assert torch.equal(found.indices, by_score.indices)


@pytest.mark.parametrize("function", FUNCTIONS)
@given(problem=problems())
def test_a_row_keeps_the_same_alone_in_a_batch_and_after_padding(function, problem):
    features, quality, r, mask, rounding = problem
    mask = torch.ones_like(quality, dtype=torch.bool) if mask is None else mask
    whole = select(function, features, quality, r, mask=mask, rounding=rounding)
    for row, candidates in enumerate(mask):
        if not candidates.any():
            assert not whole.mask[row].any()
            continue
        alone = select(
            function,
            features[row, candidates],
            quality[row, candidates],
            min(r, int(candidates.sum())) if isinstance(r, int) else r,
            rounding=rounding,
        )
        assert torch.equal(whole.mask[row, candidates], alone.mask)
        assert torch.allclose(whole.scores[row, candidates], alone.scores, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_cosines_that_do_not_fit_in_memory_are_made_a_pick_at_a_time(function, monkeypatch):
    features, quality = torch.randn(2, 70, 24), torch.rand(2, 70)
    mask = torch.arange(70) < torch.tensor([[70], [41]])
    held = select(function, features, quality, 0.3, mask=mask)
    monkeypatch.setattr(eager_greedy, "_MATRIX", 0)
    monkeypatch.setattr(eager_greedy, "_TILE", 1000)
    made = select(function, features, quality, 0.3, mask=mask)
    assert torch.equal(held.indices, made.indices)
    assert torch.allclose(held.scores, made.scores, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 33])
def test_equal_tokens_go_by_index_wherever_they_stand(num_tokens):
    features = torch.randn(1, 1, 77).expand(2, num_tokens, -1)
    count = (num_tokens + 1) // 2
    expected = torch.arange(count).expand(2, -1)
    assert torch.equal(greedy_max_min(features, count).indices, expected)
    assert torch.equal(greedy_dpp(features, torch.ones(2, num_tokens), count).indices, expected)


def test_max_min_begins_with_the_token_that_is_farthest_from_all_others():
    angles = torch.tensor([0.0, 0.1, 1.0, 1.1, 2.5])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert greedy_max_min(features, 1).indices.tolist() == [4]
    # then the one whose nearest kept token is farthest
    assert greedy_max_min(features, 2).indices.tolist() == [0, 4]
    found = greedy_max_min(features, 3)
    assert found.indices.tolist() == [0, 3, 4]
    assert found.scores[4] == 3
    assert torch.allclose(found.scores[[0, 3]], 1 - torch.tensor([2.5, 1.1]).cos(), atol=1e-6)
    # of those that are not kept, the distance to the nearest that is
    assert torch.allclose(found.scores[[1, 2]], 1 - torch.tensor([0.1, 0.1]).cos(), atol=1e-6)


def test_dpp_weighs_quality_against_difference():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    assert greedy_dpp(features, torch.tensor([1.0, 0.9, 0.5]), 2).indices.tolist() == [0, 2]
    # so little quality that even a near duplicate adds more
    assert greedy_dpp(features, torch.tensor([1.0, 0.9, 0.05]), 2).indices.tolist() == [0, 1]


def test_spanned_tokens_follow_by_quality_then_index():
    features = torch.randn(9, 3)
    features[3:] = torch.randn(6, 3) @ features[:3]
    quality = torch.tensor([1.0, 1.0, 1.0, 0.2, 0.5, 0.2, 0.4, 0.5, 0.1])
    # three dimensions, three picks; the rest adds nothing
    for budget in range(3, 10):
        kept = greedy_dpp(features, quality, budget)
        spanned = [token for token in kept.indices.tolist() if kept.scores[token] < 1e-15]
        assert len(spanned) == budget - 3
        rest = sorted(set(range(9)) - {t for t in range(9) if kept.mask[t] and kept.scores[t] > 1e-15})
        assert spanned == sorted(sorted(rest, key=lambda token: -quality[token])[: budget - 3])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("scale", [2.0**-90, 2.0**90, -8.0])
def test_the_length_of_a_token_plays_no_part(function, scale):
    features, quality = torch.randn(40, 16), torch.rand(40)
    scaled = torch.where(torch.arange(40)[:, None] % 3 == 0, features * abs(scale), features)
    expected = select(function, features, quality, 0.4)
    found = select(function, scaled, quality * abs(scale) if abs(scale) > 8 else quality * scale, 0.4)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_real_sizes_in_every_dtype(function, dtype):
    """Every pick is one of the best there are, by gains computed anew in float64."""
    features = (torch.randn(2, 576, 96) + torch.randn(2, 1, 96)).to(dtype)
    quality = torch.rand(2, 576) + 0.1
    found = select(function, features, quality, 0.2)
    assert found.indices.shape == (2, 115)
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    for row in range(2):
        kept = found.indices[row]
        order = kept[found.scores[row, kept].argsort(descending=True, stable=True)]
        cosine = unit[row] @ unit[row].T
        for place, token in enumerate(order.tolist()):
            before = order[:place]
            if function == "dpp":
                projected = torch.linalg.solve(cosine[before][:, before], cosine[before])
                gain = (quality[row].double() / quality[row].max()) ** 2 * (1 - (cosine[before] * projected).sum(0))
            elif place == 0:
                gain = 1 - (cosine - 3 * torch.eye(576)).amax(dim=0)
            else:
                gain = 1 - cosine[before].amax(dim=0)
            gain[before] = -torch.inf
            assert gain[token] > gain.max() - 1e-5


@pytest.mark.parametrize("function", FUNCTIONS)
def test_shapes_dtypes_and_grad(function):
    features, quality = torch.randn(3, 10, 4, requires_grad=True), torch.rand(3, 10, requires_grad=True)
    found = select(function, features, quality, 0.35)
    assert [tuple(field.shape) for field in found] == [(3, 10), (3, 3), (3, 10)]
    assert [field.dtype for field in found] == [torch.bool, torch.int64, torch.float32]
    assert not found.scores.requires_grad
    assert all(field.is_contiguous() for field in found), "as compiled code expects"
    alone = select(function, features[1], quality[1], 0.35)
    assert all(torch.equal(one, other[1]) for one, other in zip(alone, found, strict=True))
    assert select(function, features[:0], quality[:0], 0.35).mask.shape == (0, 10)
    assert select(function, features[:, :0], quality[:, :0], 0.35).indices.shape == (3, 0)
    none = select(function, features, quality, 2, mask=torch.zeros(3, 10, dtype=torch.bool))
    assert not none.mask.any()
    assert (none.indices == -1).all()
    assert (none.scores == -torch.inf).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles_without_a_break(function):
    features, quality = torch.randn(2, 12, 5), torch.rand(2, 12)
    mask = torch.rand(2, 12) < 0.8

    def run(features, quality, mask):
        return tuple(select(function, features * 2, quality, 0.4, mask=mask))

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for found, expected in zip(compiled(features, quality, mask), run(features, quality, mask), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_default_dtype_changes_nothing(function, dtype):
    features, quality, mask = torch.randn(2, 12, 5), torch.rand(2, 12), torch.rand(2, 12) < 0.8
    expected = select(function, features, quality, 0.4, mask=mask)
    torch.set_default_dtype(dtype)
    try:
        found = select(function, features, quality, 0.4, mask=mask)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert found.scores.dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_opcheck(function, backend, device):
    features, quality = torch.randn(2, 12, 5, device=device), torch.rand(2, 12, device=device)
    mask = torch.rand(12, 2, device=device).T < 0.8
    options = (mask, 0.4, 0, "floor", backend)
    if function == "max_min":
        torch.library.opcheck(torch.ops.hawk_kernels.greedy_max_min.default, (features, *options))
    else:
        torch.library.opcheck(torch.ops.hawk_kernels.greedy_dpp.default, (features, quality, *options))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_autocast_region_changes_nothing(function):
    features, quality = torch.randn(2, 60, 32), torch.rand(2, 60)
    expected = select(function, features, quality, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = select(function, features, quality, 0.3)
    assert torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_loops_of_the_benchmark_pick_the_same(function):
    inputs = greedy_bench.Inputs.make(greedy_bench.Shape(60, 17, hidden=32, batch=2), torch.device("cpu"))
    greedy_bench.check_parity(function, inputs, 17)
    runs = greedy_bench.contestants(function, "picks", inputs, 17)
    _, ours = runs.pop("ours")()
    assert all(torch.equal(run(), ours) for run in runs.values())
    assert set(greedy_bench.contestants(function, "whole", inputs, 17)) <= {"ours", *runs}


X, Q = torch.randn(2, 6, 3), torch.rand(2, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: greedy_max_min([1.0], 1), TypeError, "features: expected a torch.Tensor, got list"),
        (lambda: greedy_max_min(X.long(), 1), TypeError, "features: expected a floating point dtype"),
        (lambda: greedy_max_min(X[0, 0], 1), ValueError, "features: expected [B, M, D] or [M, D], got shape [3]"),
        (lambda: greedy_max_min(X, 7), ValueError, "r: expected a budget of at most 6 keys, got 7"),
        (lambda: greedy_max_min(X, 0.0), ValueError, "r: expected a float in (0, 1]"),
        (lambda: greedy_max_min(X, 1, mask=Q), TypeError, "mask: expected dtype torch.bool"),
        (lambda: greedy_max_min(X, 1, mask=Q[:1] > 0), ValueError, "mask: expected shape [2, 6] (one entry a token)"),
        (lambda: greedy_max_min(X, 1, rounding="up"), ValueError, "rounding: expected 'floor'"),
        (lambda: greedy_max_min(X, 1, backend="numpy"), ValueError, "backend: expected None, 'triton' or 'torch'"),
        (
            lambda: greedy_max_min(torch.zeros(8192, 1), 1, backend="triton"),
            ValueError,
            "backend='triton': expected at most 8191 tokens",
        ),
        (lambda: greedy_dpp(X, [1.0], 1), TypeError, "quality: expected a torch.Tensor, got list"),
        (lambda: greedy_dpp(X, Q.long(), 1), TypeError, "quality: expected a floating point dtype"),
        (lambda: greedy_dpp(X, Q[0], 1), ValueError, "quality: expected shape [2, 6], one number a token, got [6]"),
        (lambda: greedy_dpp(X, Q.to("meta"), 1), ValueError, "quality: expected device cpu as features, got meta"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
