"""Both backends against the float64 reference: shapes, dtypes, norms, masks, ties, and what floats can be."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import csrc_ref
from hawk_kernels import score_and_select, score_tokens, select_topk
from hawk_kernels.backends.kernels.select_topk import select_topk as triton_select_topk
from tests.cases import DTYPES, NORMALIZATIONS, assert_matches_reference, make_case

BACKENDS = ("torch", "triton")


def run(case, backend, device):
    moved = case.to(device)
    return score_and_select(moved.q, moved.k, moved.w, moved.r, backend=backend, **moved.options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_every_norm_and_dtype(backend, masked, dtype, normalize, device):
    case = make_case(dtype=dtype, masked=masked, normalize=normalize)
    assert_matches_reference(case, run(case, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 72, 80, 96, 128, 256])
def test_every_head_dim(backend, head_dim, device):
    for dtype, normalize in ((torch.bfloat16, "l2"), (torch.float32, None)):
        case = make_case(head_dim=head_dim, num_keys=70, dtype=dtype, normalize=normalize)
        assert_matches_reference(case, run(case, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_heads", "num_key_value_heads"), [(1, 1), (28, 4), (16, 2), (8, 8), (40, 1), (20, 4)])
def test_every_ratio_of_heads(backend, num_heads, num_key_value_heads, device):
    for normalize in (None, "l2"):
        case = make_case(num_heads=num_heads, num_key_value_heads=num_key_value_heads, num_keys=90, normalize=normalize)
        assert_matches_reference(case, run(case, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_keys", [1, 2, 63, 64, 65, 257, 1296, 2048, 2049, 5120, 16385])
def test_every_row_length(backend, num_keys, device):
    for normalize, masked in (("l2", False), ("softmax", True), (None, True)):
        case = make_case(1, 2, 1, 3, num_keys, 16, r=0.29, masked=masked, normalize=normalize)
        assert_matches_reference(case, run(case, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_longest_row(backend, device):
    case = make_case(1, 1, 1, 3, 262144, 64, dtype=torch.bfloat16, r=0.2, masked=True, normalize="l2")
    assert_matches_reference(case, run(case, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_heads", "num_key_value_heads"), [(7, 1), (8, 8)])
def test_many_ragged_rows(backend, num_heads, num_key_value_heads, device):
    case = make_case(64, num_heads, num_key_value_heads, 3, 50, 16, masked=True, normalize="l2")
    assert_matches_reference(case, run(case, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_queries", [1, 2, 33, 200, 2000])
def test_every_number_of_queries(backend, num_queries, device):
    case = make_case(num_queries=num_queries, masked=num_queries > 1, normalize="minmax")
    assert_matches_reference(case, run(case, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounding", ["floor", "ceil", "nearest"])
@pytest.mark.parametrize("r", [1e-9, 0.07, 0.29, 0.5, 1.0, 1, 5, 37], ids=str)
def test_every_budget(backend, rounding, r, device):
    for masked in (False, True):
        case = make_case(r=r, masked=masked, rounding=rounding, normalize="l2")
        assert_matches_reference(case, run(case, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_shape_of_a_real_model(backend, device):
    case = make_case(1, 28, 4, 20, 1296, 128, dtype=torch.bfloat16, r=0.2, normalize="l2", rounding="ceil")
    assert_matches_reference(case, run(case, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_sequences_with_text_and_visual_masks(backend, device):
    """The contract's shortcut: q and k are the same sequence, the masks say which tokens are text and which visual."""
    case = make_case(3, 4, 2, 50, 50, 32)
    visual = torch.zeros(3, 50, dtype=torch.bool)
    visual[0, 5:30] = visual[1, 10:12] = True
    case.options |= {"q_mask": torch.arange(50).expand(3, 50) > 35, "k_mask": visual, "normalize": "l2"}
    selection = run(case, backend, device)
    assert_matches_reference(case, selection)
    assert selection.mask.sum(dim=1).tolist() == [7, 1, 0]
    assert (selection.indices[2] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_any_strides(backend, normalize, device):
    case = make_case(2, 6, 2, 5, 37, 16, masked=True, normalize=normalize).to(device)
    expected = run(case, backend, device)
    layouts = {
        "sequence before heads": (
            case.q.transpose(1, 2).contiguous().transpose(1, 2),
            case.k.transpose(1, 2).contiguous().transpose(1, 2),
        ),
        "head_dim outermost": (
            case.q.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
            case.k.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        ),
        "every other of a larger tensor": (
            torch.repeat_interleave(case.q, 2, dim=2)[:, :, ::2],
            torch.repeat_interleave(case.k, 2, dim=3)[..., ::2],
        ),
    }
    strided_mask = torch.stack([case.options["k_mask"]] * 2, dim=-1)[..., 0]
    strided_w = torch.stack([case.w] * 3, dim=-1)[:, 1]
    for name, (q, k) in layouts.items():
        got = score_and_select(q, k, strided_w, case.r, backend=backend, **case.options | {"k_mask": strided_mask})
        assert torch.equal(got.mask, expected.mask), name
        assert torch.allclose(got.scores, expected.scores, atol=1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_tensors_with_stride_zero(backend, device):
    case = make_case(1, 4, 2, 3, 40, 16)
    case.q, case.k = case.q.expand(3, -1, -1, -1), case.k.expand(3, -1, -1, -1)
    selection = run(case, backend, device)
    assert_matches_reference(case, selection)
    assert torch.equal(selection.mask[0], selection.mask[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_unbatched_in_unbatched_out(backend, normalize, device):
    case = make_case(1, masked=True, normalize=normalize).to(device)
    batched = score_and_select(case.q, case.k, case.w, case.r, backend=backend, **case.options)
    options = {name: v[0] if isinstance(v, torch.Tensor) else v for name, v in case.options.items()}
    single = score_and_select(case.q[0], case.k[0], case.w, case.r, backend=backend, **options)
    for got, expected in zip(single, batched, strict=True):
        assert torch.equal(got, expected[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_non_finite_inputs_count_as_zero(backend, normalize, device):
    case = make_case(2, 4, 2, 3, 50, 16, normalize=normalize)
    case.k[0, 0, 3] = torch.nan
    case.k[0, 1, 7, 2] = torch.inf
    case.k[1, :, 11, 0] = -torch.inf
    case.q[1, 2, 0, 5] = torch.nan
    case.q[0, 1, :, 3] = torch.inf
    selection = run(case, backend, device)
    assert not selection.scores.isnan().any()
    assert_matches_reference(case, selection)


# The softmax of logits of 1e18 depends on their last bit, so there is nothing to compare.
EXTREMES = [(n, m) for n in NORMALIZATIONS for m in (1e-15, 1e-6, 1e9) if not (n == "softmax" and m > 1)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("normalize", "magnitude"), EXTREMES)
def test_norms_survive_extreme_magnitudes(backend, normalize, magnitude, device):
    """Squares of 1e27 overflow float32 and squares of 1e-30 vanish in it: a norm must not."""
    case = make_case(num_keys=50, normalize=normalize, scale=1.0)
    case.q, case.k = case.q * magnitude, case.k * magnitude
    assert_matches_reference(case, run(case, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scales_do_not_overflow_half_precision(backend, device):
    for scale in (1e6, 1e-6):
        case = make_case(dtype=torch.float16, scale=scale)
        assert_matches_reference(case, run(case, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_all_equal_keys_keep_the_first(backend, normalize, device):
    """Every score ties; also the degenerate norm: a zero extent in minmax, zero vectors in l2."""
    for fill in (0.0, 1.0):
        q, k = torch.ones(1, 2, 3, 16, device=device), torch.full((1, 2, 5000, 16), fill, device=device)
        selection = score_and_select(q, k, torch.ones(2, device=device), 7, normalize=normalize, backend=backend)
        assert selection.indices.tolist() == [list(range(7))]
        assert selection.scores.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@settings(max_examples=15)
@given(num_keys=st.integers(2, 200), head_dim=st.integers(1, 100), group_size=st.integers(1, 8))
def test_equal_keys_tie_wherever_they_stand(backend, normalize, num_keys, head_dim, group_size, device):
    """A matrix product that adds in another order at its edges would give the last keys other last bits."""
    case = make_case(1, 2 * group_size, 2, 5, 1, head_dim, r=(num_keys + 3) // 4, normalize=normalize)
    case.k = case.k.expand(-1, -1, num_keys, -1)
    assert run(case, backend, device).indices.tolist() == [list(range(case.r))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_settle_each_others_budgets(backend, device):
    """A row with a NaN has one score too few above its threshold, a row with a tie one too many."""
    scores = torch.tensor([[torch.nan, 3, 2, 1], [5, 1, 1, 0]])
    assert select(scores, 2, backend, device).indices.tolist() == [[1, 2], [0, 1]]
    assert_exact(torch.tensor([[torch.nan, torch.nan, 2, 1], [1, 1, 1, 1]]), 2, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_text_scores_zero(backend, device):
    case = make_case(q_mask=torch.tensor([[False] * 5, [True] * 5]), r=4).to(device)
    selection = score_and_select(case.q, case.k, case.w, case.r, backend=backend, **case.options)
    assert (selection.scores[0] == 0).all()
    assert selection.indices[0].tolist() == [0, 1, 2, 3]
    assert (selection.scores[1] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_nan_weights_rank_last_and_still_fill_the_budget(backend, normalize, device):
    case = make_case(normalize=normalize, r=5).to(device)
    case.w[1] = torch.nan
    selection = score_and_select(case.q, case.k, case.w, 5, backend=backend, normalize=normalize)
    assert selection.scores.isnan().all()
    assert selection.indices.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "num_queries", "num_keys"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty_dimensions(backend, batch, num_queries, num_keys, device):
    case = make_case(batch, num_queries=num_queries, num_keys=num_keys, r=0.5)
    selection = run(case, backend, device)
    assert selection.mask.shape == selection.scores.shape == (batch, num_keys)
    assert selection.indices.shape == (batch, 2 if num_keys else 0)
    assert_matches_reference(case, selection)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bitwise_repeatable(backend, device):
    case = make_case(2, 28, 4, 20, 700, 64, dtype=torch.bfloat16, normalize="l2", masked=True)
    first = run(case, backend, device)
    for _ in range(2):
        for got, expected in zip(run(case, backend, device), first, strict=True):
            assert torch.equal(got, expected)


def select(scores, r, backend, device, mask=None, rounding="floor"):
    if backend == "triton":
        mask = None if mask is None else mask.to(device)
        return triton_select_topk(scores.to(device), r, mask, rounding)
    return select_topk(scores, r, mask=mask, rounding=rounding)


def assert_exact(scores, r, backend, device, mask=None, rounding="floor"):
    selection = select(scores, r, backend, device, mask, rounding)
    expected = csrc_ref.select_topk(scores, r, mask=mask, rounding=rounding)
    assert torch.equal(selection.mask.cpu(), expected.mask)
    assert torch.equal(selection.indices.cpu(), expected.indices)
    assert torch.equal(selection.scores.cpu().view(torch.int32), expected.scores.view(torch.int32))


# Few distinct values make ties likely; the specials are where an order-preserving key goes wrong.
SCORES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, 3e38, -3e38])
ANY_SCORES = st.one_of(SCORES, st.floats(width=32))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60)
@given(data=st.data())
def test_selection_is_a_stable_sort(backend, device, data):
    batch, num_keys = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    rows = data.draw(
        st.lists(st.lists(ANY_SCORES, min_size=num_keys, max_size=num_keys), min_size=batch, max_size=batch)
    )
    scores = torch.tensor(rows, dtype=torch.float32)
    bits = st.lists(st.booleans(), min_size=num_keys, max_size=num_keys)
    mask = data.draw(st.none() | st.lists(bits, min_size=batch, max_size=batch).map(torch.tensor))
    r = data.draw(st.integers(1, num_keys) | st.floats(0.0, 1.0, exclude_min=True))
    assert_exact(scores, r, backend, device, mask, data.draw(st.sampled_from(["floor", "ceil", "nearest"])))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_keys", [2048, 2049, 9000])
def test_heavy_ties_drop_no_winner(backend, num_keys, device):
    """Thousands of scores tie at the threshold: what a fixed-size candidate buffer loses."""
    scores = torch.randint(0, 3, (2, num_keys)).float()
    mask = torch.rand(2, num_keys) < 0.9
    for r in (1, 0.2, 0.999):
        assert_exact(scores, r, backend, device, mask)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(data=st.data())
def test_scores_match_for_any_shape(backend, device, data):
    num_key_value_heads = data.draw(st.integers(1, 3))
    case = make_case(
        batch=data.draw(st.integers(1, 3)),
        num_heads=num_key_value_heads * data.draw(st.integers(1, 9)),
        num_key_value_heads=num_key_value_heads,
        num_queries=data.draw(st.integers(1, 40)),
        num_keys=data.draw(st.integers(1, 150)),
        head_dim=data.draw(st.integers(1, 80)),
        dtype=data.draw(st.sampled_from(DTYPES)),
        r=data.draw(st.integers(1, 200) | st.floats(0.0, 1.0, exclude_min=True)),
        masked=True,
        seed=data.draw(st.integers(0, 1000)),
        normalize=data.draw(st.sampled_from(NORMALIZATIONS)),
        rounding=data.draw(st.sampled_from(["floor", "ceil", "nearest"])),
    )
    assert_matches_reference(case, run(case, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_two_halves_make_the_whole(backend, device):
    for normalize, masked in itertools.product(NORMALIZATIONS, (False, True)):
        case = make_case(normalize=normalize, masked=masked).to(device)
        whole = run(case, backend, device)
        scores = score_tokens(case.q, case.k, case.w, backend=backend, **case.options)
        halves = select_topk(scores, case.r, mask=case.options.get("k_mask"))
        for got, expected in zip(halves, whole, strict=True):
            assert torch.equal(got, expected)
