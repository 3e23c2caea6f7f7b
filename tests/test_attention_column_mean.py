"""Attention received, both backends against the literal softmax in float64."""

import pytest
import torch

import csrc_ref
from bench import attention_column_mean as bench_of_columns
from hawk_kernels import attention_column_mean
from hawk_kernels.backends.kernels import attention_column_mean as kernels_of_columns
from hawk_kernels.backends.visibility import seeing_rows
from tests.cases import DTYPES

BACKENDS = ("torch", "triton")
REDUCTIONS = ("mean", "sum", "max")
# The attention of a column adds up to a few hundred probabilities, in float32 whatever the input.
TOLERANCE = 4e-6


def inputs(batch=2, heads=4, kv_heads=2, num_queries=5, num_keys=9, head_dim=16, dtype=torch.float32):
    q = torch.randn(batch, heads, num_queries, head_dim).to(dtype)
    return q, torch.randn(batch, kv_heads, num_keys, head_dim).to(dtype)


def assert_matches(q, k, backend, device, **options):
    moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    got = attention_column_mean(q.to(device), k.to(device), backend=backend, **moved).cpu()
    expected = csrc_ref.attention_column_mean(q.double(), k.double(), **options)
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    error = (got - expected).nan_to_num().abs()
    assert (error <= TOLERANCE * expected.nan_to_num().abs().clamp(min=1)).all(), f"error {error.max():.1e}"
    return got


def packed(*lengths):
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(5, 5), (3, 9), (9, 3), (1, 70), (40, 70), (70, 40)])
def test_every_reduction_and_shape(backend, reduction, causal, num_queries, num_keys, device):
    """With more rows than keys the first rows of causal attention see nothing, and count for nothing."""
    q, k = inputs(1, 2, 1, num_queries, num_keys)
    assert_matches(q, k, backend, device, causal=causal, reduction=reduction, reduce_heads=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 40, 64, 72, 80, 96, 128, 256])
def test_every_head_dim_and_dtype(backend, dtype, head_dim, device):
    q, k = inputs(1, 2, 1, 20, 70, head_dim, dtype)
    assert_matches(q, k, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (6, 2), (4, 4)])
def test_every_ratio_of_heads_and_what_becomes_of_them(backend, heads, kv_heads, device):
    q, k = inputs(2, heads, kv_heads)
    assert_matches(q, k, backend, device)
    assert_matches(q, k, backend, device, reduce_heads=False)
    assert_matches(q, k, backend, device, head_weights=torch.randn(heads), reduction="max")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 4, 0, 4, 13, 1, 70), (80,)], ids=str)
def test_segments_look_at_themselves_only(backend, reduction, causal, lengths, device):
    """Windows of all sizes, empty ones and single tokens, some within a tile and one across several."""
    q, k = inputs(1, 2, 1, sum(lengths), sum(lengths))
    options = {"cu_seqlens": packed(*lengths), "causal": causal, "reduction": reduction}
    assert_matches(q, k, backend, device, **options)
    if reduction == "mean":
        assert_matches(q, k, backend, device, q_rows=torch.rand(1, sum(lengths)) < 0.4, **options)


def test_many_equal_windows_run_side_by_side(device):
    q, k = inputs(1, 4, 2, 64 * 30, 64 * 30)
    windows = attention_column_mean(q, k, cu_seqlens=packed(*[64] * 30))
    alone = [attention_column_mean(q[:, :, i : i + 64], k[:, :, i : i + 64]) for i in range(0, 64 * 30, 64)]
    assert torch.allclose(windows, torch.cat(alone, dim=1), atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_only_the_given_rows_count(backend, reduction, causal, device):
    """Different rows in each sample, and none in the last: its columns are zero."""
    q, k = inputs(3, 2, 2, 40, 50)
    q_rows = torch.rand(3, 40) < torch.tensor([0.5, 0.1, 0.0])[:, None]
    got = assert_matches(q, k, backend, device, q_rows=q_rows, causal=causal, reduction=reduction)
    assert (got[2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_row_is_fastv(backend, device):
    q, k = inputs(1, 4, 2, 6, 90)
    last = torch.tensor([[False] * 5 + [True]])
    keys = k.repeat_interleave(2, dim=1)
    expected = torch.softmax(q[:, :, -1:] @ keys.transpose(2, 3) / 4, dim=-1).mean(dim=(1, 2))
    got = attention_column_mean(q.to(device), k.to(device), q_rows=last.to(device), causal=True, backend=backend)
    assert torch.allclose(got.cpu(), expected, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_gives_away_one(backend, device):
    q, k = (x.to(device) for x in inputs(1, 2, 1, 33, 70))
    total = attention_column_mean(q, k, reduction="sum", reduce_heads=False, backend=backend).sum(dim=-1)
    assert torch.allclose(total, torch.full_like(total, 33.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_and_keys_that_do_not_count_may_be_nan(backend, reduction, device):
    """Rows that do not count, and keys in the future of all that do."""
    q, k = inputs(1, 2, 2, 12, 12)
    q_rows = torch.arange(12)[None] == 5
    q[:, :, 6:], k[:, :, 6:] = torch.nan, torch.nan
    got = assert_matches(q, k, backend, device, q_rows=q_rows, causal=True, reduction=reduction)
    assert got.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_in_a_row_that_counts_is_seen_in_its_keys(backend, reduction, device):
    q, k = inputs(1, 2, 1, 40, 40)
    q[0, 0, 20, 3] = torch.nan
    got = assert_matches(q, k, backend, device, causal=True, reduction=reduction, reduce_heads=False)
    assert got[0, 0, :21].isnan().all()
    assert got[0, 0, 21:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend, device):
    q, k = inputs(1, 2, 1, 20, 20)
    assert_matches(q, k, backend, device, scale=50.0)
    assert_matches(q, k, backend, device, scale=-50.0, causal=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "num_queries", "num_keys"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_dimensions(backend, batch, num_queries, num_keys, device):
    q, k = inputs(batch, 2, 1, num_queries, num_keys)
    for reduction in REDUCTIONS:
        assert_matches(q, k, backend, device, reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unbatched_strided_and_bitwise_repeatable(backend, device):
    base = torch.randn(2, 30, 4, 16, device=device)
    q, k = base.transpose(1, 2), base[:, :, ::2].transpose(1, 2)
    rows = torch.rand(2, 30, device=device) < 0.5
    batched = attention_column_mean(q, k, q_rows=rows, backend=backend)
    for row in range(2):
        single = attention_column_mean(q[row], k[row], q_rows=rows[row], backend=backend)
        assert torch.equal(single, batched[row])
    for _ in range(3):
        assert torch.equal(attention_column_mean(q, k, q_rows=rows, backend=backend), batched)
    assert attention_column_mean(q[0], k[0], reduce_heads=False, backend=backend).shape == (4, 30)


def test_poisoned_memory_does_not_show(monkeypatch, device):
    """Outputs and workspace come from torch.empty: every byte that is read must have been written."""
    q, k = (x[0].unsqueeze(0).to(device) for x in inputs(1, 2, 1, 70, 70))
    options = [
        (None, True, "sum"),
        (packed(1, 40, 29).to(device), False, "mean"),
        (None, False, "max"),
    ]
    run = kernels_of_columns.attention_column_mean
    clean = [run(q, k, cu, causal, None, None, True, reduction, 0.25) for cu, causal, reduction in options]
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(torch.nan))
    for (cu, causal, reduction), expected in zip(options, clean, strict=True):
        assert torch.equal(run(q, k, cu, causal, None, None, True, reduction, 0.25), expected)


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

    from hawk_kernels.backends.eager import attention_column_mean as torch_backend

    q, k = inputs(1, 8, 2, 3000, 3000)
    with Largest() as largest:
        torch_backend.attention_column_mean(q, k, None, True, None, None, True, "mean", 0.25)
    assert 0 < largest.numel < 0.02 * 8 * 3000 * 3000


Q, K = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
PACKED = dict(q=Q[:1], k=K[:1, :, :3])
BAD_CALLS = {
    "q no tensor": (dict(q=[1.0]), TypeError, "q: expected a torch.Tensor, got list; use torch.as_tensor"),
    "float64": (dict(q=Q.double(), k=K.double()), TypeError, "q: expected dtype float32, float16 or bfloat16"),
    "mixed dtypes": (dict(k=K.half()), TypeError, "k: expected the dtype of q, torch.float32, got torch.float16"),
    "k unbatched": (dict(k=K[0]), ValueError, r"k: expected \[B, Hkv, M, D\] because q has 4 dim"),
    "head_dim": (dict(k=K[..., :4]), ValueError, "k: expected head_dim 8 as q has, got 4"),
    "KV heads": (dict(k=torch.randn(2, 3, 5, 8)), ValueError, "KV heads that divides q's 4 heads, got 3"),
    "device": (dict(k=K.to("meta")), ValueError, "k: expected device cpu as q, got meta; use k.to"),
    "segments type": (PACKED | dict(cu_seqlens=[0, 3]), TypeError, "cu_seqlens: expected a torch.Tensor, got list"),
    "segments dtype": (
        PACKED | dict(cu_seqlens=torch.tensor([0, 3])),
        TypeError,
        r"cu_seqlens: expected dtype torch.int32, got torch.int64; use cu_seqlens.int\(\)",
    ),
    "segments shape": (
        PACKED | dict(cu_seqlens=torch.zeros(1).int()),
        ValueError,
        r"cu_seqlens: expected shape \[S \+ 1\] for S >= 1 segments, got \[1\]; the first",
    ),
    "segments of a batch": (
        dict(cu_seqlens=packed(3)),
        ValueError,
        r"q: expected batch size 1 beside cu_seqlens, got 2; pack",
    ),
    "segments of two lengths": (
        dict(q=Q[:1], k=K[:1], cu_seqlens=packed(3)),
        ValueError,
        "k: expected the 3 tokens of q beside cu_seqlens, got 5",
    ),
    "segments too short": (
        PACKED | dict(cu_seqlens=packed(1, 1)),
        ValueError,
        r"cu_seqlens: expected ascending positions from 0 to 3, .*, got \[0, 1, 2\]; use torch",
    ),
    "segments device": (PACKED | dict(cu_seqlens=packed(3).to("meta")), ValueError, "cu_seqlens: expected device cpu"),
    "causal": (dict(causal=1), TypeError, "causal: expected a bool, got int; use True or False"),
    "reduce_heads": (dict(reduce_heads=None), TypeError, "reduce_heads: expected a bool, got NoneType"),
    "q_rows dtype": (dict(q_rows=torch.ones(2, 3)), TypeError, "q_rows: expected dtype torch.bool, got torch.float32"),
    "q_rows shape": (dict(q_rows=torch.ones(3) > 0), ValueError, r"q_rows: expected shape \[2, 3\] \(one entry a que"),
    "weights shape": (
        dict(head_weights=torch.ones(3)),
        ValueError,
        r"head_weights: expected shape \[4\], one weight a head of q, got \[3\]",
    ),
    "weights dtype": (dict(head_weights=torch.ones(4).int()), TypeError, "head_weights: expected a floating point"),
    "weights of separate heads": (
        dict(head_weights=torch.ones(4), reduce_heads=False),
        ValueError,
        "head_weights: expected None with reduce_heads=False",
    ),
    "reduction": (dict(reduction="min"), ValueError, "reduction: expected 'mean', 'sum' or 'max', got 'min'"),
    "scale": (dict(scale=True), TypeError, "scale: expected a float or None"),
    "scale nan": (dict(scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
    "backend": (dict(backend="cuda"), ValueError, "backend: expected None, 'triton' or 'torch', got 'cuda'"),
}


@pytest.mark.parametrize("limits", [[0, 2], [0, 9, 3], [0, -1, 3], [1, 3]], ids=str)
def test_segments_are_checked_on_a_cpu_whatever_the_backend(limits):
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="cu_seqlens: expected ascending positions from 0 to 3"):
            attention_column_mean(**PACKED, cu_seqlens=torch.tensor(limits).int(), backend=backend)


@pytest.mark.filterwarnings("error")
def test_segments_of_any_stride():
    limits = torch.stack([packed(1, 2), packed(3, 0)], dim=1)[:, 0]
    for backend in BACKENDS:
        got = attention_column_mean(**PACKED, cu_seqlens=limits, q_rows=torch.ones(1, 3) > 0, backend=backend)
        assert torch.equal(got, attention_column_mean(**PACKED, cu_seqlens=packed(1, 2), backend=backend))


def test_counting_rows_of_unchecked_segments_stays_inside():
    """Where a GPU is not waited for, an index beyond the end would take its context with it."""
    bounds = torch.tensor([-5, 0, 9]).int(), torch.tensor([9, 2**31 - 1, -7]).int()
    for q_rows in (None, torch.ones(1, 3) > 0):
        assert seeing_rows(3, 3, bounds, False, q_rows, torch.device("cpu")).tolist() == [[3, 3, 1]]


def test_more_heads_than_the_last_dimension_of_a_grid_has(monkeypatch):
    """65535 are the most programs of every dimension but the first."""
    grids = []

    class Recording:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **constants: None

    for kernel in ("_row_pass", "_column_pass", "_finish"):
        monkeypatch.setattr(kernels_of_columns, kernel, Recording())
    q, k = inputs(batch=70_000, heads=2, kv_heads=1, num_queries=2, num_keys=3)
    attention_column_mean(q, k, backend="triton")
    assert len(grids) == 3
    assert all(max(grid[1:]) < 2**16 for grid in grids)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_to_do(name):
    changes, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        attention_column_mean(**{"q": Q, "k": K} | changes)


def test_operator_under_pytorch_machinery():
    """Registered shapes, one graph, no grad, no autocast inside."""
    rows = torch.rand(2, 3) < 0.7
    for arguments in (
        (Q, K, None, True, rows, torch.ones(4), True, "mean", 0.3, "torch"),
        (Q[:1], K[:1, :, :3], packed(1, 2), False, None, None, False, "max", 0.3, "torch"),
    ):
        torch.library.opcheck(torch.ops.hawk_kernels.attention_column_mean.default, arguments)
    q = Q.clone().requires_grad_()
    expected = attention_column_mean(q, K, causal=True, q_rows=rows)
    assert not expected.requires_grad
    compiled = torch.compile(attention_column_mean, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(Q, K, causal=True, q_rows=rows), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_column_mean(Q, K, causal=True, q_rows=rows), expected)


def test_whoever_fails_parity_or_raises_is_named_and_not_timed(monkeypatch):
    usual = bench_of_columns.contestants

    def contestants(shape, device):
        def raising():
            raise RuntimeError("no kernel image\nfor this device")

        runs = usual(shape, device)
        return {**runs, "off": lambda: 1.1 * runs["ours"](), "raising": raising}

    monkeypatch.setattr(bench_of_columns, "contestants", contestants)
    monkeypatch.setattr(bench_of_columns, "peak_memory", lambda *_: 0.0)
    row = bench_of_columns.measure(bench_of_columns.Shape(8, 16, causal=True), 2, torch.device("cpu"))
    assert row["off"]["failed"].startswith("an error of")
    assert row["raising"] == {"failed": "RuntimeError: no kernel image"}
    assert row["ours"]["error"] < 4e-6
    assert {name for name, entry in row.items() if isinstance(entry, dict) and "median" in entry} == {"ours", "literal"}
    monkeypatch.setattr(bench_of_columns, "ours", lambda q, k, shape, cu_seqlens: torch.zeros(1, 16))
    with pytest.raises(SystemExit, match="parity failed at 8 x 16 causal with an error of 1"):
        bench_of_columns.measure(bench_of_columns.Shape(8, 16, causal=True), 2, torch.device("cpu"))
