"""Calls that skip the dispatcher: only plain ones do, and a signature that has passed hides no error."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hawk_kernels import (
    Layer,
    score_and_select,
    score_hidden,
    score_hidden_and_select,
    score_peaks,
    score_tokens,
    select_topk,
)
from hawk_kernels.backends import choose
from hawk_kernels.backends.choose import plain_signature
from hawk_kernels.ops import score_and_select as of_queries
from hawk_kernels.ops import score_hidden as of_hidden
from hawk_kernels.ops import score_peaks as of_peaks
from hawk_kernels.ops import select_topk as of_scores
from hawk_kernels.validation import Passed

Q, K, W, X = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.ones(4), torch.randn(2, 6, 16)
TEXT = torch.tensor([[True, True, False, False, False, False]] * 2)
LAYER = Layer(None, 1e-6, torch.randn(8, 16), None, torch.randn(4, 16), None)

# each operator: its function and a call of it by the one tensor that a test changes
CALLS = {
    "score_and_select": (Q, lambda q: score_and_select(q, K.to(q.device), W.to(q.device), 0.4, normalize="l2")),
    "score_tokens": (Q, lambda q: score_tokens(q, K.to(q.device), W.to(q.device), normalize="softmax")),
    "score_peaks": (Q, lambda q: score_peaks(q, K.to(q.device), W.to(q.device))),
    "score_hidden_and_select": (X, lambda x: score_hidden_and_select(x, LAYER, W, 0.4, q_mask=TEXT, k_mask=~TEXT)),
    "score_hidden": (X, lambda x: score_hidden(x, LAYER, W, q_mask=TEXT, k_mask=~TEXT)),
    "select_topk": (Q[0, 0], lambda scores: select_topk(scores, 2)),
}
MODULES = {name: of_hidden if "hidden" in name else of_queries for name in CALLS}
MODULES |= {"score_peaks": of_peaks, "select_topk": of_scores}


def tensors_of(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def assert_same(got, expected):
    for one, other in zip(tensors_of(got), tensors_of(expected), strict=True):
        assert torch.equal(one, other)


class Dispatched(TorchDispatchMode):
    """Collects the names of the operators that the dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.name())
        return operator(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Collects the functions that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """Notes what it is given to."""

    names: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.names.append(str(function))
        return super().__torch_function__(function, types, args, kwargs or {})


def by_dispatch_mode(call, tensor):
    with Dispatched() as mode:
        call(tensor)
    return " ".join(mode.names)


def by_function_mode(call, tensor):
    with Called() as mode:
        call(tensor)
    return " ".join(mode.names).replace("hawk_kernels.", "hawk_kernels::")


def by_subclass(call, tensor):
    Wrapped.names.clear()
    call(tensor.as_subclass(Wrapped))
    return " ".join(Wrapped.names).replace("hawk_kernels.", "hawk_kernels::")


def by_make_fx(call, tensor):
    graph = make_fx(lambda value: tensors_of(call(value)))(tensor).graph
    return " ".join(str(node.target) for node in graph.nodes).replace("hawk_kernels.", "hawk_kernels::")


def by_symbolic_make_fx(call, tensor):
    graph = make_fx(lambda value: tensors_of(call(value)), tracing_mode="symbolic", _allow_non_fake_inputs=True)(tensor)
    return " ".join(str(node.target) for node in graph.graph.nodes).replace("hawk_kernels.", "hawk_kernels::")


def by_jit_trace(call, tensor):
    traced = torch.jit.trace(lambda value: tensors_of(call(value)), tensor, check_trace=False)
    return " ".join(node.kind() for node in traced.graph.nodes())


def by_profiler(call, tensor):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(tensor)
    return " ".join(event.name for event in profile.events())


def by_export(call, tensor):
    class Module(torch.nn.Module):
        def forward(self, value):
            return tensors_of(call(value))

    graph = torch.export.export(Module(), (tensor,), strict=False).graph
    return " ".join(str(node.target) for node in graph.nodes).replace("hawk_kernels.", "hawk_kernels::")


WATCHERS = (
    by_dispatch_mode,
    by_function_mode,
    by_subclass,
    by_make_fx,
    by_symbolic_make_fx,
    by_jit_trace,
    by_profiler,
    by_export,
)


# the checks of a layer divide sizes, which are tensors under `torch.jit.trace`
WATCHED = [(name, watch) for name in CALLS for watch in WATCHERS if watch != by_jit_trace or "hidden" not in name]


@pytest.mark.parametrize(("name", "watch"), WATCHED)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_whoever_watches_sees_the_operator(name, watch):
    tensor, call = CALLS[name]
    call(tensor)
    assert f"hawk_kernels::{name}" in watch(call, tensor)


@pytest.mark.parametrize("name", CALLS)
def test_a_plain_call_does_not_meet_the_dispatcher(name, monkeypatch):
    """Also in inference mode, without grad, under autocast, and with parameters."""
    tensor, call = CALLS[name]
    through = getattr(torch.ops.hawk_kernels, name).default
    count = []
    monkeypatch.setattr(MODULES[name], f"_{name}", lambda *arguments: count.append(1) or through(*arguments))
    expected = call(tensor)
    assert_same(call(torch.nn.Parameter(tensor)), expected)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(call(tensor), expected)
    with torch.inference_mode():
        assert_same(call(tensor.clone()), expected)
    assert not count
    with Dispatched():
        assert_same(call(tensor), expected)
    assert count


@pytest.mark.parametrize("name", CALLS)
def test_no_gradient_of_any_kind_gets_through(name):
    tensor, call = CALLS[name]
    for got in tensors_of(call(tensor.clone().requires_grad_())):
        assert not got.requires_grad
    with forward_ad.dual_level():
        results = tensors_of(call(forward_ad.make_dual(tensor, torch.ones_like(tensor))))
        assert all(forward_ad.unpack_dual(got).tangent is None for got in results)


def test_tensors_that_are_not_simply_values_in_memory():
    negated = torch.view_as_complex(torch.stack((Q, -Q), dim=-1)).conj().imag
    assert negated.is_neg()
    assert torch.equal(negated, Q)
    assert_same(score_and_select(negated, K, W, 0.4), score_and_select(Q, K, W, 0.4))
    for name in ("score_and_select", "score_tokens", "score_peaks", "select_topk"):
        tensor, call = CALLS[name]
        for got, expected in zip(tensors_of(call(tensor.to("meta"))), tensors_of(call(tensor)), strict=True):
            assert got.is_meta
            assert got.shape == expected.shape
    for other in (negated, Q.to("meta"), Q.to_sparse(), torch._subclasses.FakeTensorMode().from_tensor(Q)):
        assert plain_signature(Q, other) is None
    assert plain_signature(Q, torch.nn.Parameter(K)) is not None


def test_transforms_are_not_skipped():
    seen = []

    def note(scores):
        seen.append(plain_signature(scores, Q))
        return scores.sum()

    torch.vmap(note)(Q)
    torch.func.grad(note)(Q)
    torch.func.jvp(note, (Q,), (Q,))
    torch.func.functionalize(note)(Q)
    assert seen == [None] * 4


def test_a_signature_holds_what_the_checks_look_at():
    assert plain_signature(Q, None) == ((Q.shape, Q.stride(), Q.dtype, Q.device), None)
    different = (Q, Q[:1], Q.half(), Q.mT.contiguous().mT, Q.to("meta"), None)
    assert len({plain_signature(other) for other in different}) == len(different)


BAD_AFTER_GOOD = {
    "a bool for an epsilon": (dict(layer=LAYER._replace(norm_eps=True)), TypeError, "layer.norm_eps: expected a float"),
    "a negative epsilon": (dict(layer=LAYER._replace(norm_eps=-1.0)), ValueError, "layer.norm_eps: expected a finite"),
    "a bool for a number of heads": (
        dict(layer=LAYER._replace(wk=LAYER.wk[:2], num_key_value_heads=True)),
        TypeError,
        "num_key_value_heads: expected a divisor",
    ),
    "another number of heads": (dict(layer=LAYER._replace(num_key_value_heads=4)), ValueError, "layer.wk: expected"),
    "a list": (dict(layer=LAYER._replace(num_key_value_heads=[1])), TypeError, "num_key_value_heads: expected"),
    "a tuple for a layer": (dict(layer=tuple(LAYER)), TypeError, "layer: expected a hawk_kernels.Layer, got tuple"),
    "no mask": (dict(k_mask=None), TypeError, "k_mask: expected a torch.Tensor, got NoneType"),
    "a mask of another shape": (dict(q_mask=TEXT[:, :3]), ValueError, r"q_mask: expected shape \[2, 6\]"),
    "a norm": (dict(normalize=["l2"]), ValueError, "normalize: expected None"),
    "a scale": (dict(scale=float("inf")), ValueError, "scale: expected a finite number"),
    "a ratio": (dict(r=1.5), ValueError, "r: expected a float"),
    "a budget": (dict(r=0), ValueError, "r: expected a float"),
    "a rounding": (dict(rounding="up"), ValueError, "rounding: expected 'floor'"),
    "a backend": (dict(backend="cuda"), ValueError, "backend: expected None"),
}


@pytest.mark.parametrize("name", BAD_AFTER_GOOD)
def test_a_call_that_passed_hides_no_error_of_the_next(name):
    changes, error, message = BAD_AFTER_GOOD[name]
    good = dict(x=X, layer=LAYER, w=W, r=0.4, q_mask=TEXT, k_mask=~TEXT)
    score_hidden_and_select(**good)
    score_hidden_and_select(**good | dict(layer=LAYER._replace(norm_eps=1.0, num_key_value_heads=2)))
    score_hidden_and_select(**good | dict(layer=LAYER._replace(wk=LAYER.wk[:2], num_key_value_heads=1)))
    with pytest.raises(error, match=message):
        score_hidden_and_select(**good | changes)


def test_values_are_looked_at_in_every_call():
    spoilt = W.clone()
    spoilt[1] = torch.nan
    assert score_tokens(Q, K, W).isfinite().all()
    assert score_tokens(Q, K, spoilt).isnan().all()
    assert score_and_select(Q, K, W, 1).mask.sum() == 2
    assert score_and_select(Q, K, W, 2).mask.sum() == 4


def test_what_has_passed_keeps_no_tensor_alive():
    q = torch.randn(1, 2, 3, 8)
    k, w = torch.randn(1, 2, 7, 8), torch.ones(2)
    score_and_select(q, k, w, 2)
    gone = [weakref.ref(tensor) for tensor in (q, k, w)]
    del q, k, w
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_what_has_passed_is_limited():
    passed = Passed(limit=3)
    for number in range(10):
        passed.add(number)
        assert number in passed
        assert len(passed) <= 3


def test_many_threads_ask_and_add():
    passed = Passed(limit=8)

    def work(seed):
        for number in range(2000):
            passed.add((seed * number) % 13)
            assert (100, number) not in passed
            assert len(passed) <= 8

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_without_the_private_names_every_call_goes_through_the_dispatcher(monkeypatch):
    direct = score_and_select(Q, K, W, 2)
    monkeypatch.setattr(choose, "_CAN_SKIP_DISPATCH", False)
    assert plain_signature(Q, K, W) is None
    dispatched = score_and_select(Q, K, W, 2)
    assert all(map(torch.equal, dispatched, direct))
