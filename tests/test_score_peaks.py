"""Peaks of attention, both backends against the literal maximum in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import csrc_ref
from hawk_kernels import attention_column_mean, score_peaks, score_tokens
from hawk_kernels.backends.eager import score_peaks as torch_backend
from hawk_kernels.backends.kernels import score_peaks as kernels_of_peaks
from tests.cases import DTYPES, NORMALIZATIONS, SCORE_TOLERANCE, make_case

BACKENDS = ("torch", "triton")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_norm = pytest.mark.parametrize("normalize", NORMALIZATIONS)


def assert_matches(case, backend, device):
    """Scores agree with float64, and there are as many as the reference has."""
    moved = case.to(device)
    got = score_peaks(moved.q, moved.k, moved.w, backend=backend, **moved.options).cpu()
    expected = csrc_ref.score_peaks(case.q.double(), case.k.double(), case.w.double(), **case.options)
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert (got[~finite] == -torch.inf).all()
    largest = expected[finite].abs().amax().clamp(min=1e-30) if finite.any() else 1.0
    error = ((got - expected)[finite].abs() / largest).amax().item() if finite.any() else 0.0
    assert error <= SCORE_TOLERANCE[case.q.dtype], f"relative error {error:.1e}"
    return got


@every_backend
@every_norm
@pytest.mark.parametrize("masked", [False, True])
def test_every_norm_with_masks_and_without(backend, normalize, masked, device):
    """The masked queries and keys are NaN; the last row has no text, the one before no candidates."""
    case = make_case(3, 4, 2, 5, 37, 16, masked=masked, normalize=normalize)
    if masked:
        case.options["q_mask"][2] = False
        case.options["k_mask"][1] = False
    got = assert_matches(case, backend, device)
    if masked:
        assert (got[2][case.options["k_mask"][2]] == 0).all()


@every_backend
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(1, torch.float32), (40, torch.bfloat16), (72, torch.float16), (80, torch.float32), (256, torch.bfloat16)],
    ids=str,
)
def test_every_head_dim_and_dtype(backend, head_dim, dtype, device):
    assert_matches(make_case(1, 2, 1, 3, 40, head_dim, dtype, normalize="softmax"), backend, device)


@every_backend
@pytest.mark.parametrize(("num_heads", "num_key_value_heads"), [(1, 1), (7, 1), (6, 2), (4, 4)])
def test_every_ratio_of_heads(backend, num_heads, num_key_value_heads, device):
    assert_matches(make_case(2, num_heads, num_key_value_heads, 3, 9, normalize="softmax"), backend, device)


@every_backend
@every_norm
def test_more_text_and_more_keys_than_a_tile_holds(backend, normalize, device):
    """Ranges of keys and tiles of the text, in one of which no token counts."""
    case = make_case(1, 2, 1, 70, 150, 16, masked=True, normalize=normalize)
    case.options["q_mask"][0, 16:64] = False
    assert_matches(case, backend, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_keys", [1296, 16384])
def test_long_rows_in_several_tiles(num_keys, dtype):
    """The softmax of a head and text token is what `attention_column_mean` makes of it."""
    case = make_case(1, 4, 2, 70, num_keys, 32, dtype)
    expected = attention_column_mean(case.q, case.k, head_weights=case.w, reduction="max")
    assert torch.allclose(score_peaks(case.q, case.k, case.w), expected, rtol=1e-5, atol=0)


@every_backend
@every_norm
def test_products_that_are_not_finite_count_as_zero(backend, normalize, device):
    case = make_case(2, 2, 1, 4, 20, normalize=normalize)
    case.q[0, 0, 1, 3], case.q[0, 1, 2, 0] = torch.nan, torch.inf
    case.k[1, 0, 5, 2], case.k[1, 0, 7, 1] = torch.nan, -torch.inf
    assert_matches(case, backend, device)


@every_backend
@every_norm
def test_of_a_single_text_token_mean_and_maximum_are_the_same(backend, normalize, device):
    case = make_case(2, 4, 2, 1, 33, normalize=normalize).to(device)
    of_mean = score_tokens(case.q, case.k, case.w, backend=backend, **case.options)
    of_maximum = score_peaks(case.q, case.k, case.w, backend=backend, **case.options)
    assert torch.allclose(of_maximum, of_mean, rtol=1e-5, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_order_and_repetition_of_the_text_change_nothing(data):
    """And a text token more never lowers a score, since weights are not negative."""
    num_queries = data.draw(st.integers(1, 6))
    case = make_case(1, 4, 2, num_queries, data.draw(st.integers(1, 50)), 8, seed=data.draw(st.integers(0, 99)))
    options = {"normalize": data.draw(st.sampled_from(NORMALIZATIONS))}
    scores = score_peaks(case.q, case.k, case.w, **options)
    order = data.draw(st.lists(st.integers(0, num_queries - 1), max_size=4)) + list(range(num_queries))[::-1]
    assert torch.allclose(score_peaks(case.q[:, :, order], case.k, case.w, **options), scores, rtol=1e-5, atol=1e-6)
    fewer = score_peaks(case.q[:, :, :1], case.k, case.w, **options)
    assert (fewer <= scores + 1e-5 * scores.abs().amax()).all()


@every_backend
def test_equal_keys_tie_wherever_they_stand(backend, device):
    case = make_case(1, 4, 2, 5, 67, 24)
    case.k[:, :, [3, 31, 32, 66]] = case.k[:, :, :1]
    case = case.to(device)
    scores = score_peaks(case.q, case.k, case.w, backend=backend)[0]
    assert len(scores[[0, 3, 31, 32, 66]].unique()) == 1


@every_backend
@pytest.mark.parametrize(("batch", "num_queries", "num_keys"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_dimensions(backend, batch, num_queries, num_keys, device):
    for normalize in ("softmax", None):
        assert_matches(make_case(batch, 2, 1, num_queries, num_keys, normalize=normalize), backend, device)


@every_backend
def test_unbatched_strided_and_bitwise_repeatable(backend, device):
    base = torch.randn(2, 30, 4, 16, device=device)
    q, k, w = base.transpose(1, 2), base[:, :, ::2].transpose(1, 2), torch.rand(8, device=device)[::2]
    q_mask, k_mask = (torch.rand(2, 30, device=device) < 0.5 for _ in range(2))
    batched = score_peaks(q, k, w, q_mask=q_mask, k_mask=k_mask, backend=backend)
    for row in range(2):
        single = score_peaks(q[row], k[row], w, q_mask=q_mask[row], k_mask=k_mask[row], backend=backend)
        assert torch.equal(single, batched[row])
    assert torch.equal(score_peaks(q, k, w, q_mask=q_mask, k_mask=k_mask, backend=backend), batched)


def test_poisoned_memory_does_not_show(monkeypatch, device):
    """Outputs and workspace come from torch.empty: every byte that is read must have been written."""
    case = make_case(2, 4, 2, 20, 70, masked=True).to(device)
    arguments = (case.q, case.k, case.w, case.options["q_mask"], case.options["k_mask"], "softmax", 0.25)
    clean = kernels_of_peaks.score_peaks(*arguments)
    empty = torch.empty

    def poisoned(*size, **kwargs):
        tensor = empty(*size, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 0x7FC00000)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(kernels_of_peaks.score_peaks(*arguments), clean)


def test_one_launch_whatever_the_size(monkeypatch, device):
    grids = []

    class Recording:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **constants: None

    monkeypatch.setattr(kernels_of_peaks, "_score_peaks_kernel", Recording())
    for num_keys in (1, 5000):
        case = make_case(2, 4, 2, 20, num_keys).to(device)
        score_peaks(case.q, case.k, case.w, backend="triton")
    assert [len(grid) for grid in grids] == [1, 1]


def test_a_launch_of_too_many_programs_is_refused():
    with pytest.raises(ValueError, match=r"expected at most 2147483647 .* in a launch, got \d+; split the batch"):
        kernels_of_peaks.make_plan(2**20, 32, 32, 64, 65536, 128, 2, "softmax")


def test_the_matrix_is_never_stored():
    """The largest tensor that the PyTorch path makes is a tile, far below `H N M`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    case = make_case(1, 8, 2, 1000, 3000, 16)
    with Largest() as largest:
        torch_backend.score_peaks(case.q, case.k, case.w, None, None, "softmax", 0.25)
    assert 0 < largest.numel < 0.03 * 8 * 1000 * 3000


def test_without_onednn_the_scores_are_the_same(monkeypatch):
    case = make_case(1, 4, 2, 5, 100)
    expected = score_peaks(case.q, case.k, case.w)
    monkeypatch.setattr(torch_backend, "_HAS_ONEDNN", False)
    assert torch.allclose(score_peaks(case.q, case.k, case.w), expected, rtol=1e-6, atol=1e-8)


Q, K, W = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.rand(4)
BAD_CALLS = {
    "q no tensor": (dict(q=[1.0]), TypeError, "q: expected a torch.Tensor, got list; use torch.as_tensor"),
    "float64": (dict(q=Q.double(), k=K.double()), TypeError, "q: expected dtype float32, float16 or bfloat16"),
    "mixed dtypes": (dict(k=K.half()), TypeError, "k: expected the dtype of q, torch.float32, got torch.float16"),
    "k unbatched": (dict(k=K[0]), ValueError, r"k: expected \[B, Hkv, M, D\] because q has 4 dim"),
    "KV heads": (dict(k=torch.randn(2, 3, 5, 8)), ValueError, "KV heads that divides q's 4 heads, got 3"),
    "weights shape": (dict(w=torch.ones(3)), ValueError, r"w: expected shape \[4\], one weight a head of q, got \[3\]"),
    "weights dtype": (dict(w=torch.ones(4).int()), TypeError, "w: expected a floating point dtype, got torch.int32"),
    "q_mask shape": (dict(q_mask=torch.ones(3) > 0), ValueError, r"q_mask: expected shape \[2, 3\] \(one entry a que"),
    "k_mask dtype": (dict(k_mask=torch.ones(2, 5)), TypeError, "k_mask: expected dtype torch.bool, got torch.float32"),
    "normalize": (dict(normalize="l1"), ValueError, "normalize: expected None, 'l2', 'softmax' or 'minmax', got 'l1'"),
    "scale": (dict(scale=True), TypeError, "scale: expected a float or None"),
    "backend": (dict(backend="cuda"), ValueError, "backend: expected None, 'triton' or 'torch', got 'cuda'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_to_do(name):
    changes, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        score_peaks(**{"q": Q, "k": K, "w": W} | changes)


def test_operator_under_pytorch_machinery():
    """Registered shapes, one graph, no grad, no autocast inside."""
    rows = torch.rand(2, 3) < 0.7
    arguments = (Q, K, W, rows, None, "softmax", 0.3, "torch")
    torch.library.opcheck(torch.ops.hawk_kernels.score_peaks.default, arguments)
    q = Q.clone().requires_grad_()
    expected = score_peaks(q, K, W, q_mask=rows)
    assert not expected.requires_grad
    compiled = torch.compile(score_peaks, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(Q, K, W, q_mask=rows), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score_peaks(Q, K, W, q_mask=rows), expected)
