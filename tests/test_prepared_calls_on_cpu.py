"""Prepared calls of the PyTorch path: the second call of a signature gives, bit for bit, what a first one gives."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hawk_kernels import free_workspaces, score_and_select, score_tokens
from hawk_kernels.backends.choose import PreparedCalls
from hawk_kernels.backends.eager import score_and_select as eager
from hawk_kernels.ops import score_and_select as of_queries
from tests.cases import DTYPES, NORMALIZATIONS, assert_matches_reference, make_case


@pytest.fixture(autouse=True)
def nothing_prepared(monkeypatch):
    monkeypatch.setattr(of_queries, "_prepared", PreparedCalls())
    monkeypatch.setattr(of_queries, "_prepared_scores", PreparedCalls())
    monkeypatch.setattr(eager, "_kept", {})


def call(case, **options):
    return score_and_select(case.q, case.k, case.w, case.r, **case.options | options)


def in_memory_of_its_own(case):
    """What the operator computes, which prepares nothing and keeps nothing."""
    batched = case.q.dim() == 4
    q, k, w, q_mask, k_mask = of_queries.batched_without_grad(
        case.q, case.k, case.w, case.options.get("q_mask"), case.options.get("k_mask")
    )
    scale, rounding = case.options.get("scale"), case.options.get("rounding", "floor")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    selection = eager.score_and_select(q, k, w, case.r, q_mask, k_mask, case.options["normalize"], scale, rounding)
    return selection if batched else type(selection)(*(tensor[0] for tensor in selection))


def assert_same_bits(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def spoil_nothing(case):
    pass


def spoil_a_key(case):
    case.k[..., 0, case.k.shape[-2] // 2, :] = torch.nan


def spoil_a_query(case):
    case.q[..., -1, 0, 0] = torch.inf


def spoil_a_weight(case):
    case.w[0] = torch.nan


def make_all_keys_equal(case):
    case.k[:] = case.k[..., :1, :]


def let_squares_overflow(case):
    case.q[..., :1, :, :] *= 60000.0 if case.q.dtype == torch.float16 else 1e25


def let_squares_vanish(case):
    case.q[..., :1, :, :] *= 1e-4 if case.q.dtype == torch.float16 else 1e-25


def make_keys_zero(case):
    case.k.zero_()


def empty_a_mask(case):
    if "k_mask" in case.options:
        case.options["k_mask"][..., :] = False


def empty_the_text(case):
    if "q_mask" in case.options:
        case.options["q_mask"][..., :] = False


SPOILERS = (
    spoil_nothing,
    spoil_a_key,
    spoil_a_query,
    spoil_a_weight,
    make_all_keys_equal,
    let_squares_overflow,
    let_squares_vanish,
    make_keys_zero,
    empty_a_mask,
    empty_the_text,
)


def turned(tensor):
    """Lay out the tokens in front of the heads, as a projection leaves them."""
    return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_later_call_gives_what_a_first_one_gives(data):
    """Whatever the values were before: they spoil nothing that a call of the same signature finds later."""
    num_key_value_heads = data.draw(st.sampled_from([1, 2, 4]))
    shape = dict(
        batch=data.draw(st.integers(1, 3)),
        num_heads=num_key_value_heads * data.draw(st.integers(1, 8)),
        num_key_value_heads=num_key_value_heads,
        num_keys=data.draw(st.integers(1, 130) | st.sampled_from([333, 2064, 2100])),
        num_queries=data.draw(st.integers(1, 5)),
        head_dim=data.draw(st.sampled_from([1, 8, 40])),
        dtype=data.draw(st.sampled_from(DTYPES)),
        normalize=data.draw(st.sampled_from(NORMALIZATIONS)),
        masked=data.draw(st.booleans()),
        r=data.draw(st.sampled_from([0.3, 1.0, 1])),
        rounding=data.draw(st.sampled_from(["floor", "ceil", "nearest"])),
        scale=data.draw(st.sampled_from([None, 0.3, -2.0, 0.0])),
    )
    unbatched, is_turned, dtype = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.sampled_from(DTYPES))
    before = None
    for seed, spoil in enumerate(data.draw(st.lists(st.sampled_from(SPOILERS), min_size=2, max_size=4))):
        case = make_case(**shape, seed=seed)
        if is_turned:
            case.q, case.k = turned(case.q), turned(case.k)
        if unbatched:
            case.q, case.k = case.q[0], case.k[0]
            case.options |= {name: case.options[name][0] for name in ("q_mask", "k_mask") if name in case.options}
        case.w = case.w.to(dtype)
        spoil(case)
        got = call(case)
        assert_same_bits(got, in_memory_of_its_own(case))
        without_selecting = {name: value for name, value in case.options.items() if name != "rounding"}
        scores = score_tokens(case.q, case.k, case.w, **without_selecting)
        torch.testing.assert_close(scores, got.scores, rtol=0, atol=0, equal_nan=True)
        if before is not None:
            assert_same_bits(*before)
        before = got, [tensor.clone() for tensor in got]
    assert len(of_queries._prepared) > 0


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(("batch", "num_keys"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_score(batch, num_keys, normalize):
    case = make_case(batch, num_keys=num_keys, normalize=normalize)
    for _ in range(3):
        assert_same_bits(call(case), in_memory_of_its_own(case))


@pytest.mark.parametrize("num_keys", [5, 48, 50])
def test_results_share_no_memory_with_anything(num_keys):
    """Not with those of another call, not with the arguments, and not with what is kept."""
    case = make_case(1, num_keys=num_keys, normalize="l2")
    results = [call(case) for _ in range(3)]
    storages = [tensor.untyped_storage().data_ptr() for result in results for tensor in result]
    storages += [tensor.untyped_storage().data_ptr() for tensor in (case.q, case.k, case.w)]
    assert len(set(storages)) == len(storages)
    expected = [tensor.clone() for tensor in results[0]]
    for tensor in results[1]:
        tensor.zero_()
    assert_same_bits(results[0], expected)
    assert_same_bits(call(case), expected)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_tensor_of_a_call_stays_alive(dtype, normalize):
    """All but the memory between the steps is gone, and that is limited."""
    case = make_case(dtype=dtype, normalize=normalize, masked=True)
    case.w.requires_grad_()
    results = [*call(case), *call(case)]
    tensors = case.q, case.k, case.w, *results, case.options["q_mask"], case.options["k_mask"]
    gone = [weakref.ref(tensor) for tensor in tensors]
    del case, results, tensors
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


def test_what_is_kept_is_limited():
    for num_keys in range(1, 30):
        call(make_case(num_keys=num_keys))
        assert 1 <= len(eager._kept) <= eager._MOST_KEPT
    eager._kept.clear()
    # more bytes of logits than are kept
    long = make_case(1, 8, 1, 1, eager._MOST_KEPT_BYTES // 32 + 16, 1, normalize="l2")
    assert_same_bits(call(long), in_memory_of_its_own(long))
    assert not eager._kept


def test_what_is_kept_is_freed_on_demand():
    case = make_case()
    before = call(case)
    kept = sum(memory.num_bytes for memory in eager._kept.values())
    assert kept > 0
    assert free_workspaces() >= kept
    assert not eager._kept
    assert_same_bits(call(case), before)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_many_threads_call_at_once(normalize):
    """Two threads never compute in the same memory, whether their calls are of one signature or of several."""
    cases = [
        make_case(1, num_keys=num_keys, normalize=normalize, seed=seed) for num_keys in (37, 48) for seed in (0, 1)
    ]
    expected = [in_memory_of_its_own(case) for case in cases]

    def work(number):
        for step in range(150):
            index = (number + step * (number + 1)) % len(cases)
            assert_same_bits(call(cases[index]), expected[index])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


MODES = {
    "plain": torch.enable_grad,
    "without grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_a_call_in_one_mode_prepares_for_another(first, second, normalize):
    """Memory that is first used in inference mode can be written outside; autocast casts no product of scores."""
    case = make_case(num_heads=6, num_keys=50, normalize=normalize)
    expected = in_memory_of_its_own(case)
    for mode in (first, second, first):
        with MODES[mode]():
            assert_same_bits(call(case), expected)
            gradual = make_case(num_heads=6, num_keys=50, normalize=normalize)
            for tensor in (gradual.q, gradual.k, gradual.w):
                tensor.requires_grad_()
            got = call(gradual)
            assert not any(tensor.requires_grad for tensor in got)
            assert_same_bits(got, expected)
    assert len(of_queries._prepared) == 1


def test_options_of_another_type_or_value_are_other_calls():
    case = make_case(1, num_keys=40, normalize="l2")
    assert call(case).indices.shape == (1, 12)
    for r, width in ((1, 1), (1.0, 40), (7, 7), (0.3, 12)):
        case.r = r
        assert call(case).indices.shape == (1, width)
    for r in (True, "0.3", None):
        case.r = r
        with pytest.raises(TypeError, match="r: expected a float"):
            call(case)
    case.r = 0.31
    assert call(case).indices.shape == (1, 12)
    assert call(case, rounding="ceil").indices.shape == (1, 13)
    assert not torch.equal(call(case).scores, call(case, normalize=None).scores)
    with pytest.raises(ValueError, match="backend: expected None"):
        call(case, backend="cuda")
    with pytest.raises(ValueError, match="backend: expected None"):
        call(case, backend=["torch"])
    with pytest.raises(ValueError, match="normalize: expected None"):
        call(case, normalize=["l2"])


def test_a_mask_is_another_call_and_its_values_are_not():
    case = make_case(1, num_keys=40, normalize="l2")
    everything = call(case)
    for count in (40, 3, 0, 40):
        mask = torch.arange(40)[None] < count
        selection = call(case, k_mask=mask)
        assert (selection.indices >= 0).sum() == (max(1, int(0.3 * count)) if count else 0)
        assert torch.equal(selection.scores.isfinite(), mask)
    assert_same_bits(call(case), everything)
    assert len(of_queries._prepared) == 2


def test_keys_elsewhere_in_a_buffer_are_the_same_call():
    """A signature has no place in memory: every call reads where its own keys begin."""
    buffer = torch.randn(1, 2, 200, 16)
    case = make_case(1, 6, 2, 3, 37, 16, normalize="l2")
    for start in (0, 11, 163):
        case.k = buffer[:, :, start : start + 37]
        assert_matches_reference(case, call(case))
    for start in (0, 7):
        case.k = buffer.flatten()[start : start + 2 * 37 * 16].view(1, 2, 37, 16)
        assert_matches_reference(case, call(case))
    assert len(of_queries._prepared) == 2


def test_a_call_that_fails_leaves_nothing_behind(monkeypatch):
    case = make_case(normalize="l2")
    expected = call(case)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "mean", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(case)
    assert_same_bits(call(case), expected)


def test_fake_tensors_and_compiled_code_do_not_meet_what_is_prepared():
    case = make_case(1, num_keys=40, normalize="l2")
    expected = call(case)
    with torch._subclasses.FakeTensorMode() as mode:
        case_of_fakes = replace(case, **{name: mode.from_tensor(getattr(case, name)) for name in ("q", "k", "w")})
        assert all(isinstance(tensor, torch._subclasses.FakeTensor) for tensor in call(case_of_fakes))
    graphs = []

    def note(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q: call(replace(case, q=q)), backend=note, fullgraph=True)
    assert_same_bits(compiled(case.q), expected)
    assert [node.target for node in graphs[0].graph.nodes if "hawk_kernels" in str(node.target)] == [
        torch.ops.hawk_kernels.score_and_select.default
    ]
    assert_same_bits(call(case), expected)
    assert len(of_queries._prepared) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_elsewhere_than_on_a_cpu_no_value_is_read(normalize, dtype):
    """A meta tensor has no values, so a computation that looks at one, and would wait for a GPU, fails."""
    for num_keys, masked in ((5, False), (37, True), (48, False), (2100, True), (40000, False)):
        case = make_case(num_heads=14, num_keys=num_keys, dtype=dtype, masked=masked, normalize=normalize)
        selection = in_memory_of_its_own(case.to(torch.device("meta")))
        width = max(1, int(0.3 * num_keys))
        assert [tuple(tensor.shape) for tensor in selection] == [(2, num_keys), (2, width), (2, num_keys)]
