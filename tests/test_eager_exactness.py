"""The PyTorch backend on a CPU: exact ties and repeatable bits by every way that it takes through the keys."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import csrc_ref
from bench.timing import peak_bytes
from hawk_kernels import score_and_select, score_tokens, select_topk
from hawk_kernels.backends.choose import PreparedCalls
from hawk_kernels.backends.eager import score_and_select as eager
from hawk_kernels.backends.eager import score_hidden as eager_hidden
from hawk_kernels.ops import score_and_select as of_queries
from tests.cases import DTYPES, NORMALIZATIONS, SCORE_TOLERANCE, assert_matches_reference, make_case

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["as sized", "in small pieces", "streamed", "streamed in small pieces"])
def way(request, monkeypatch):
    """Send short rows through what is there for long ones: many pieces, keys as rows of a product."""
    # what was prepared before has another way
    monkeypatch.setattr(of_queries, "_prepared", PreparedCalls())
    if "small pieces" in request.param:
        monkeypatch.setattr(eager, "_TILE", 1 << 12)
        monkeypatch.setattr(eager, "_LONGEST_PIECE", 64)
    if "streamed" in request.param:
        monkeypatch.setattr(eager, "_STREAMED", 0)
    return request.param


def run(case):
    return score_and_select(case.q, case.k, case.w, case.r, backend="torch", **case.options)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equal_keys_score_equally_wherever_they_stand(threads, way, data):
    """Few different keys at random places of a row: each scores the same bits everywhere, so lower indices win."""
    num_keys = data.draw(st.integers(1, 700) | st.sampled_from([1024, 1296, 1301, 2064, 5120]))
    num_key_value_heads = data.draw(st.sampled_from([1, 2, 4]))
    case = make_case(
        batch=data.draw(st.integers(1, 2)),
        num_heads=num_key_value_heads * data.draw(st.integers(1, 9)),
        num_key_value_heads=num_key_value_heads,
        num_keys=4,
        head_dim=data.draw(st.sampled_from([1, 16, 40, 64, 128])),
        dtype=data.draw(st.sampled_from(DTYPES)),
        seed=data.draw(st.integers(0, 1000)),
        r=0.3,
        normalize=data.draw(st.sampled_from(NORMALIZATIONS)),
    )
    kinds = torch.randint(4, (num_keys,), generator=torch.Generator().manual_seed(num_keys))
    case.k = case.k[:, :, kinds]
    selection = run(case)
    for scores in selection.scores:
        for kind in range(4):
            assert scores[kinds == kind].unique().numel() <= 1
    exact = csrc_ref.select_topk(selection.scores, case.r)
    assert torch.equal(selection.indices, exact.indices)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equal_hidden_states_score_equally_wherever_they_stand(threads, data):
    """Rows of several tiles, with candidates that are one span of tokens and others that are not."""
    num_tokens, num_heads = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    kinds = torch.randint(4, (num_tokens,), generator=generator)
    x = torch.randn(2, 4, data.draw(st.sampled_from([16, 48, 256])), generator=generator)[:, kinds]
    x = x.to(data.draw(st.sampled_from(DTYPES)))
    mask = torch.rand(2, num_tokens, generator=generator) < data.draw(st.sampled_from([0.3, 1.0]))
    folded = torch.randn(2, num_heads, x.shape[2], generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager_hidden, "_TOKENS", 96)
        c = eager_hidden._logits(x, mask, folded, 1e-6)
    importance = eager.weighted_sum(c[None, :, None], torch.rand(1, num_heads, generator=generator), None, None)[0]
    for row in range(2):
        for kind in range(4):
            assert importance[row, :num_tokens][mask[row] & (kinds == kind)].unique().numel() <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_every_way_gives_the_scores_of_the_reference(way, normalize, dtype):
    for num_keys, masked in ((5, False), (333, False), (333, True), (1296, True), (2064, False)):
        case = make_case(2, 14, 2, 3, num_keys, 40, dtype=dtype, masked=masked, normalize=normalize)
        assert_matches_reference(case, run(case))


@pytest.mark.parametrize("num_heads", [1, 2, 3, 14])
def test_both_sides_of_every_seam_give_the_scores_of_the_reference(way, num_heads):
    """Lengths at which a row gets another way, another number of pieces, or columns that no key fills."""
    num_key_value_heads = 1 if num_heads < 14 else 2
    for num_keys in (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 145):
        for normalize in (None, "l2"):
            case = make_case(2, num_heads, num_key_value_heads, 3, num_keys, 40, normalize=normalize)
            assert_matches_reference(case, run(case))


LAYOUTS = {
    "tokens in front of heads": lambda k: k.transpose(1, 2).contiguous().transpose(1, 2),
    "the middle of a sequence": lambda k: torch.nn.functional.pad(k, (0, 0, 3, 5), value=torch.nan)[:, :, 3:-5],
    "the end of a buffer": lambda k: torch.cat((torch.full((7,), torch.nan), k.flatten()))[7:].view(k.shape),
    "one row for all": lambda k: k[:1].expand(k.shape),
    "wider heads": lambda k: torch.nn.functional.pad(k, (0, 4), value=torch.nan)[..., :-4],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_keys_are_read_wherever_they_lie(way, layout, batch):
    """What lies between the keys in memory is NaN and must not show; neither may keys of another head."""
    for num_keys in (37, 64, 333):
        case = make_case(batch, 6, 2, 3, num_keys, 16, normalize="l2")
        case.k = LAYOUTS[layout](case.k)
        assert_matches_reference(case, run(case))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_keys_of_one_head_leave_the_scores_of_the_others_alone(way, bad):
    """A head whose keys are not finite scores 0 there; its neighbours in memory score as if they stood alone."""
    case = make_case(2, 6, 3, 3, 333, 16, normalize="l2")
    case.k[0, 1] = bad
    selection = run(case)
    assert_matches_reference(case, selection)
    assert selection.scores.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_run_after_run(threads, way, dtype):
    for num_keys, normalize in ((333, None), (333, "softmax"), (2064, "l2"), (2064, "minmax")):
        case = make_case(1, 28, 4, 20, num_keys, 64, dtype=dtype, normalize=normalize)
        first = run(case)
        for _ in range(2):
            for got, expected in zip(run(case), first, strict=True):
                assert torch.equal(got, expected)


def test_the_same_bits_whatever_ran_before():
    """A tile that is used again must not let the row before it show."""
    case, other = (make_case(1, 8, 2, 3, 333, 32, dtype=torch.bfloat16, seed=seed, normalize="l2") for seed in (0, 1))
    expected = run(case)
    other.k.fill_(torch.nan)
    run(other)
    for got, before in zip(run(case), expected, strict=True):
        assert torch.equal(got, before)


@pytest.mark.parametrize("num_keys", [1000, 16384, 70001])
def test_the_norm_of_a_long_constant_row_keeps_its_last_bits(num_keys):
    """Equal squares all round in one direction, so a float32 sum of many of them drifts away."""
    case = make_case(1, 2, 1, 1, 1, 16, normalize="l2")
    case.k = case.k.expand(-1, -1, num_keys, -1)
    expected = csrc_ref.score_tokens(case.q.double(), case.k.double(), case.w.double(), normalize="l2")
    error = (run(case).scores.double() / expected - 1).abs().max().item()
    assert error <= SCORE_TOLERANCE[torch.float32]


@pytest.mark.parametrize("magnitude", [1e-25, 1e-14, 1e14, 1e25])
@pytest.mark.parametrize("num_keys", [37, 5000])
def test_the_norm_is_right_where_squares_leave_float32(magnitude, num_keys):
    """One head far below or above the others must not be taken for one that float32 can hold."""
    case = make_case(1, 4, 1, 3, num_keys, 16, normalize="l2", scale=1.0)
    case.q[:, 1] *= magnitude
    assert_matches_reference(case, run(case))


def test_logits_just_below_the_largest_float_count(way):
    """The mean is taken first, and the scale last, so that no sum on the way is larger than a logit without a scale."""
    for num_keys in (32, 37):
        case = make_case(1, 3, 1, 64, num_keys, 16, normalize="l2", scale=1e-3)
        case.q, case.k = case.q.abs() * 2e18, case.k.abs() * 2e18
        assert_matches_reference(case, run(case))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_heads_that_do_not_score_leave_the_others_alone(bad):
    """Without a norm the heads of a group fold into one query, but not where one of them counts as 0."""
    case = make_case(2, 6, 2, 3, 50, 16)
    case.q[1, 2, 0, 5] = bad
    case.k[0, 1, 7, 2] = bad
    selection = run(case)
    assert_matches_reference(case, selection)
    assert selection.scores.isfinite().all()


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_shows_in_every_score(weight):
    case = make_case(1, 6, 2, 3, 50, 16)
    case.w[1] = weight
    assert not run(case).scores.isfinite().any()


def test_heads_fold_whose_weights_cancel():
    case = make_case(1, 4, 2, 3, 50, 16)
    case.w = torch.tensor([1.0, -1.0, 0.0, 0.0])
    case.q[:, 1] = case.q[:, 0]
    assert (score_tokens(case.q, case.k, case.w, backend="torch") == 0).all()


def test_rows_with_masks_and_budgets_of_their_own():
    scores = torch.randn(5, 200)
    mask = torch.rand(5, 200) < torch.tensor([0.05, 0.3, 0.6, 1.0, 0.9])[:, None]
    mask[:, 0] = True
    for r, rounding in ((0.2, "floor"), (0.2, "ceil"), (1.0, "floor"), (40, "floor"), (1, "floor")):
        got = select_topk(scores, r, mask=mask, rounding=rounding)
        expected = csrc_ref.select_topk(scores, r, mask=mask, rounding=rounding)
        assert torch.equal(got.mask, expected.mask)
        assert torch.equal(got.indices, expected.indices)


def test_selections_share_no_memory_with_the_scores_they_came_from():
    scores = torch.randn(1, 50)
    before = scores.clone()
    selection = select_topk(scores, 0.2)
    for tensor in selection:
        tensor.zero_()
    assert torch.equal(scores, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_are_never_copied_whole(dtype):
    case = make_case(1, 8, 2, 3, 40000, 128, dtype=dtype, r=0.2, normalize="l2")
    assert peak_bytes(lambda: run(case), CPU) < case.k.numel() * 4 / 2
