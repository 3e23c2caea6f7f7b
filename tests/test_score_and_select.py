"""The public surface: names, signatures, what errors say, and how the operators behave under PyTorch's machinery."""

import inspect
import subprocess
import sys
from operator import attrgetter

import numpy as np
import pytest
import torch

import hawk_kernels
from hawk_kernels import Selection, score_and_select, score_tokens, select_topk
from tests.cases import NORMALIZATIONS, make_case

SIGNATURES = {
    "score_and_select": "(q, k, w, r, *, q_mask=None, k_mask=None, normalize=None, scale=None, rounding='floor', "
    "backend=None)",
    "score_tokens": "(q, k, w, *, q_mask=None, k_mask=None, normalize=None, scale=None, backend=None)",
    "score_hidden": "(x, layer, w, *, q_mask, k_mask, normalize=None, scale=None, backend=None)",
    "score_hidden_and_select": "(x, layer, w, r, *, q_mask, k_mask, normalize=None, scale=None, rounding='floor', "
    "backend=None)",
    "score_peaks": "(q, k, w, *, q_mask=None, k_mask=None, normalize='softmax', scale=None, backend=None)",
    "Layer": "(norm_weight, norm_eps, wq, bq, wk, bk, num_key_value_heads=None)",
    "Layer.of": "(norm, q_proj, k_proj, num_key_value_heads=None)",
    "select_topk": "(scores, r, *, mask=None, rounding='floor')",
    "attention_column_mean": "(q, k, *, cu_seqlens=None, causal=False, q_rows=None, head_weights=None, "
    "reduce_heads=True, reduction='mean', scale=None, backend=None)",
    "compact": "(inputs_embeds, keep_mask, *, position_ids=None, length=None, merge=None, backend=None)",
    "greedy_dpp": "(features, quality, r, *, mask=None, rounding='floor', backend=None)",
    "greedy_max_min": "(features, r, *, mask=None, rounding='floor', backend=None)",
    "hiprune_select": "(object_attention, deep_attention, r, *, grid, alpha=0.1, rounding='floor')",
    "prune": (
        "(model, keep_ratio, *, method='hawk', head_weights=None, budget='shared', query=None, mode=None, "
        "positions='original', recipe=None, **options)"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_frozen(name):
    signature = inspect.signature(attrgetter(name)(hawk_kernels))
    bare = signature.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    assert str(bare) == SIGNATURES[name]


def test_names_are_frozen():
    assert hawk_kernels.__all__ == [
        "Compacted",
        "Layer",
        "Pruning",
        "Selection",
        "attention_column_mean",
        "calibrate",
        "compact",
        "free_workspaces",
        "greedy_dpp",
        "greedy_max_min",
        "hiprune_select",
        "load_processor",
        "prune",
        "score_and_select",
        "score_hidden",
        "score_hidden_and_select",
        "score_peaks",
        "score_tokens",
        "select_topk",
        "warm_up",
        "warm_up_score_and_select",
    ]
    assert set(hawk_kernels.__all__) <= set(dir(hawk_kernels))
    assert Selection._fields == ("mask", "indices", "scores")
    assert hawk_kernels.Compacted._fields == ("inputs_embeds", "position_ids", "attention_mask", "source")
    for name in hawk_kernels.__all__:
        assert getattr(hawk_kernels, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        hawk_kernels.prunes  # noqa: B018


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_needs_torch_only():
    """Neither triton nor transformers is imported, and where they are missing the error brings the pip command."""
    run_python(
        "import sys, torch; before = set(sys.modules); import hawk_kernels\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert not new & {'transformers', 'triton', 'PIL', 'sklearn'}, new"
    )
    run_python(
        "import sys, torch\n"
        "sys.modules['triton'] = sys.modules['transformers'] = None\n"
        "import hawk_kernels as h\n"
        "q, k, w = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.ones(2)\n"
        "assert h.score_and_select(q, k, w, 2).mask.sum() == 2\n"
        "def message(call):\n"
        "    try: call()\n"
        "    except ImportError as error: return str(error)\n"
        "assert 'pip install triton' in message(lambda: h.score_and_select(q, k, w, 2, backend='triton'))\n"
        "assert 'pip install transformers' in message(lambda: h.prune)\n"
    )


def test_import_changes_nothing_global():
    run_python(
        "import torch\n"
        "state = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),\n"
        "    torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(), torch.initial_seed())\n"
        "before = state(); import hawk_kernels; assert state() == before"
    )


Q, K, W = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.ones(4)
BAD_CALLS = {
    "q no tensor": (dict(q=[1.0]), TypeError, "q: expected a torch.Tensor, got list; use torch.as_tensor"),
    "k no tensor": (dict(k=np.ones(3)), TypeError, "k: expected a torch.Tensor, got ndarray"),
    "w no tensor": (dict(w=[1.0] * 4), TypeError, "w: expected a torch.Tensor, got list"),
    "float64": (dict(q=Q.double(), k=K.double()), TypeError, "q: expected dtype float32, float16 or bfloat16, got"),
    "integers": (dict(k=K.long()), TypeError, "k: expected dtype .*; use k.float()"),
    "mixed dtypes": (dict(k=K.half()), TypeError, "k: expected the dtype of q, torch.float32, got torch.float16"),
    "integer weights": (dict(w=W.long()), TypeError, "w: expected a floating point dtype, got torch.int64"),
    "q dimensions": (dict(q=Q[0, 0]), ValueError, r"q: expected \[B, H, N, D\] or \[H, N, D\], got shape \[3, 8\]"),
    "k unbatched": (dict(k=K[0]), ValueError, r"k: expected \[B, Hkv, M, D\] because q has 4 dim.*\[2, 5, 8\]"),
    "q unbatched": (dict(q=Q[0]), ValueError, r"k: expected \[Hkv, M, D\] because q has 3 dimensions"),
    "batch": (dict(k=K[:1]), ValueError, "k: expected batch size 2 as q has, got 1"),
    "head_dim": (dict(k=K[..., :4]), ValueError, "k: expected head_dim 8 as q has, got 4"),
    "head_dim 0": (dict(q=Q[..., :0], k=K[..., :0]), ValueError, "q: expected at least one head and head_dim >= 1"),
    "no heads": (dict(q=Q[:, :0], w=W[:0]), ValueError, "q: expected at least one head"),
    "KV heads": (dict(k=torch.randn(2, 3, 5, 8)), ValueError, "KV heads that divides q's 4 heads, got 3"),
    "no KV heads": (dict(k=K[:, :0]), ValueError, "KV heads that divides q's 4 heads, got 0"),
    "weights": (dict(w=torch.ones(3)), ValueError, r"w: expected shape \[4\], one weight a head of q, got \[3\]"),
    "weights 2-D": (dict(w=torch.ones(4, 1)), ValueError, r"w: expected shape \[4\].*got \[4, 1\]"),
    "q_mask type": (dict(q_mask=[True]), TypeError, "q_mask: expected a bool torch.Tensor or None, got list"),
    "q_mask dtype": (dict(q_mask=torch.ones(2, 3)), TypeError, "q_mask: expected dtype torch.bool, got torch.float32"),
    "q_mask shape": (dict(q_mask=torch.ones(3) > 0), ValueError, r"q_mask: expected shape \[2, 3\] \(one entry a que"),
    "k_mask shape": (dict(k_mask=torch.ones(2, 3) > 0), ValueError, r"k_mask: expected shape \[2, 5\] .*got \[2, 3\]"),
    "normalize": (dict(normalize="L2"), ValueError, "normalize: expected None, 'l2', 'softmax' or 'minmax', got 'L2'"),
    "scale type": (dict(scale="1"), TypeError, "scale: expected a float or None .*, got str"),
    "scale bool": (dict(scale=True), TypeError, "scale: expected a float or None .*, got bool"),
    "scale nan": (dict(scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
    "backend": (dict(backend="cuda"), ValueError, "backend: expected None, 'triton' or 'torch', got 'cuda'"),
    "triton head_dim": (
        dict(q=torch.randn(2, 4, 3, 257), k=torch.randn(2, 2, 5, 257), backend="triton"),
        ValueError,
        "backend='triton': expected head_dim <= 256, got 257; use backend='torch'",
    ),
    "device": (dict(k=K.to("meta")), ValueError, "k: expected device cpu as q, got meta; use k.to"),
    "mask device": (dict(k_mask=torch.ones(2, 5, device="meta") > 0), ValueError, "k_mask: expected device cpu"),
    "rounding": (dict(rounding="round"), ValueError, "rounding: expected 'floor' .* or 'ceil' .*, got 'round'"),
    "r zero": (dict(r=0.0), ValueError, r"r: expected a float in \(0, 1\].*got 0.0; it is the fraction kept, not"),
    "r above one": (dict(r=1.5), ValueError, "for a budget pass the int 2"),
    "r percent": (dict(r=20.0), ValueError, "for a budget pass the int 20"),
    "r nan": (dict(r=float("nan")), ValueError, "got nan"),
    "r negative": (dict(r=-0.2), ValueError, r"got -0.2"),
    "r int zero": (dict(r=0), ValueError, "got 0; to keep everything use 1.0"),
    "r bool": (dict(r=True), TypeError, "an int >= 1 .*, got bool"),
    "r text": (dict(r="20%"), TypeError, "got str"),
    "r tensor": (dict(r=torch.tensor(0.2)), TypeError, r"got Tensor; read it first: r.item\(\) waits for the device"),
    "r above M": (
        dict(r=6),
        ValueError,
        r"r: expected a budget of at most 5 keys, got 6; use a float, or min\(budget, 5\)",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_to_do(name):
    changes, error, message = BAD_CALLS[name]
    arguments = {"q": Q, "k": K, "w": W, "r": 0.5} | changes
    with pytest.raises(error, match=message):
        score_and_select(**arguments)
    if not set(changes) & {"r", "rounding"}:
        del arguments["r"]
        with pytest.raises(error, match=message):
            score_tokens(**arguments)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton': expected tensors on a GPU, got device 'cpu'; move them"):
        score_and_select(Q, K, W, 2, backend="triton")


def test_a_budget_beyond_the_candidates_is_clamped_under_a_mask():
    mask = torch.tensor([[True, False, True, False, False], [False] * 5])
    selection = score_and_select(Q, K, W, 100, k_mask=mask)
    assert selection.mask.tolist() == mask.tolist()
    assert selection.indices.tolist() == [[0, 2, -1, -1, -1], [-1] * 5]


def test_numbers_that_are_no_builtin_floats():
    expected = score_and_select(Q, K, W, 0.4).mask
    assert torch.equal(score_and_select(Q, K, W, np.float64(0.4), scale=np.float32(8**-0.5)).mask, expected)
    assert torch.equal(score_and_select(Q, K, W, np.int64(2)).mask, expected)


def test_outputs_never_require_grad():
    q, k, w = (tensor.clone().requires_grad_() for tensor in (Q, K, W))
    selection = score_and_select(q, k, w, 2, normalize="l2")
    assert not any(tensor.requires_grad for tensor in selection)
    assert not score_tokens(q, k, w).requires_grad
    assert not select_topk(torch.randn(5, requires_grad=True), 2).scores.requires_grad


def test_inputs_are_left_alone():
    case = make_case(masked=True, normalize="minmax")
    kept = [tensor.clone() for tensor in (case.q, case.k, case.w)]
    score_and_select(case.q, case.k, case.w, 0.3, **case.options)
    scores = torch.randn(2, 9)
    selection = select_topk(scores, 3)
    assert selection.scores.data_ptr() != scores.data_ptr()
    for tensor, before in zip((case.q, case.k, case.w), kept, strict=True):
        assert torch.equal(tensor.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_autocast_does_not_reach_the_scores(normalize):
    expected = score_tokens(Q, K, W, normalize=normalize)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(score_tokens(Q, K, W, normalize=normalize), expected)
        assert torch.equal(score_and_select(Q, K, W, 2, normalize=normalize).scores, expected)


def test_default_dtype_does_not_reach_the_scores():
    torch.set_default_dtype(torch.float64)
    try:
        for normalize in NORMALIZATIONS:
            assert score_and_select(Q, K, W, 0.4, normalize=normalize).scores.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def opcheck_samples():
    dense, masked = make_case(num_keys=20), make_case(num_keys=20, masked=True)
    for case in (dense, masked):
        q_mask, k_mask = case.options.get("q_mask"), case.options.get("k_mask")
        for normalize, ratio, budget in ((None, 0.3, 0), ("l2", 1.0, 4), ("softmax", 0.29, 0), ("minmax", 1.0, 20)):
            common = (case.q, case.k, case.w, q_mask, k_mask)
            yield (
                torch.ops.hawk_kernels.score_and_select.default,
                (*common, ratio, budget, normalize, 0.25, "floor", "torch"),
            )
            yield torch.ops.hawk_kernels.score_tokens.default, (*common, normalize, 0.25, "torch")
            yield (
                torch.ops.hawk_kernels.select_topk.default,
                (torch.randn(2, 20), k_mask, ratio, budget, "ceil", "torch"),
            )
            yield (
                torch.ops.hawk_kernels.select_topk.default,
                (torch.randn(20, 2).T, k_mask, ratio, budget, "ceil", "torch"),
            )


def test_opcheck():
    for operator, arguments in opcheck_samples():
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph(dynamic, masked):
    """Also with other row lengths and budgets: shapes are known without running anything."""

    def step(q, k, w, r, q_mask, k_mask):
        mask, indices, scores = score_and_select(q, k, w, r, q_mask=q_mask, k_mask=k_mask, normalize="l2")
        halves = select_topk(score_tokens(q, k, w, q_mask=q_mask, k_mask=k_mask), r, mask=k_mask)
        return mask, indices + 0, scores * 1, halves.mask

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_keys, r in ((37, 0.3), (50, 0.3), (64, 0.29), (50, 5), (61, 7)):
        case = make_case(num_keys=num_keys, masked=masked)
        arguments = (case.q, case.k, case.w, r, case.options.get("q_mask"), case.options.get("k_mask"))
        for got, expected in zip(compiled(*arguments), step(*arguments), strict=True):
            assert torch.equal(got, expected)


def test_unbatched_input_compiles():
    compiled = torch.compile(lambda q, k, w: score_and_select(q, k, w, 0.5), fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(Q[0], K[0], W), score_and_select(Q[0], K[0], W, 0.5), strict=True):
        assert torch.equal(got, expected)


def test_fake_tensors_know_the_shapes():
    with torch._subclasses.FakeTensorMode():
        q, k, w = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 100, 8), torch.ones(4)
        selection = score_and_select(q, k, w, 0.29)
    assert selection.mask.shape == selection.scores.shape == (2, 100)
    assert selection.indices.shape == (2, 29)


def test_export():
    class Scorer(torch.nn.Module):
        def forward(self, q, k, w):
            return tuple(score_and_select(q, k, w, 0.4, normalize="softmax"))

    exported = torch.export.export(Scorer(), (Q, K, W))
    for got, expected in zip(exported.module()(Q, K, W), Scorer()(Q, K, W), strict=True):
        assert torch.equal(got, expected)


def test_works_inside_inference_mode():
    with torch.inference_mode():
        assert score_and_select(Q, K, W, 2).mask.sum() == 4
