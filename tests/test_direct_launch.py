"""Launches that pass Triton by reach the driver as Triton's own do; a pretended driver receives both."""

import ast
import gc
import importlib
import pkgutil
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, KernelInterface, create_function_from_signature

from bench import few_kernels
from bench.pretended_driver import SM_90, pretended_driver
from hawk_kernels import (
    Layer,
    attention_column_mean,
    compact,
    greedy_dpp,
    greedy_max_min,
    score_and_select,
    score_hidden,
    score_hidden_and_select,
    score_peaks,
    score_tokens,
    select_topk,
)
from hawk_kernels.backends import kernels
from hawk_kernels.backends.choose import PreparedCalls
from hawk_kernels.backends.kernels import attention_column_mean as columns_kernels
from hawk_kernels.backends.kernels import compact as compact_kernels
from hawk_kernels.backends.kernels import compiled, configs, prepared
from hawk_kernels.backends.kernels import score_and_select as kernels_of_queries
from hawk_kernels.backends.kernels import score_hidden as kernels_of_hidden
from hawk_kernels.backends.kernels import score_peaks as kernels_of_peaks
from hawk_kernels.backends.kernels import select_topk as kernels_of_scores
from hawk_kernels.ops import attention_column_mean as of_columns
from hawk_kernels.ops import compact as of_embeds
from hawk_kernels.ops import score_and_select as of_queries
from hawk_kernels.ops import score_hidden as of_hidden
from hawk_kernels.ops import score_peaks as of_peaks
from hawk_kernels.ops import select_topk as of_scores


def kernels_that_are_launched():
    """Return the module and the name of each; only they say which of their arguments vary with the prompt."""
    found = []
    for _, name, _ in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        module = importlib.import_module(name)
        for attribute, value in vars(module).items():
            if isinstance(value, KernelInterface) and value.fn.__module__ == name:
                options = vars(value) if isinstance(value, JITFunction) else value.kwargs
                found += [(module, attribute)] if options["do_not_specialize"] else []
    return found


class Launched:
    """What the driver has received, in order."""

    def __init__(self):
        self.received = []

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        thread = threading.get_ident()
        arguments = tuple(map(as_pointers, arguments))
        # Triton passes its hooks, of which there are none; a direct launch passes None
        launch = SimpleNamespace(
            grid=(x, y, z), stream=stream, function=function, metadata=metadata, arguments=arguments, thread=thread
        )
        launch.is_direct = enter_hook is None and exit_hook is None and launch_metadata is None
        self.received.append(launch)

    def take(self):
        received, self.received = self.received, []
        return received


def as_pointers(argument):
    """Return an argument as the C code of a launcher reads it; tuples are flat there, so their types do not count."""
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return tuple(map(as_pointers, argument)) if isinstance(argument, tuple) else argument


def told(launch):
    """Return all that the driver is told, with None for addresses of memory that is allocated in the call."""
    return launch.grid, launch.stream, launch.function, launch.metadata, launch.arguments


@pytest.fixture
def launched(monkeypatch):
    return Launched()


@pytest.fixture
def driver(monkeypatch, launched):
    """A pretended driver, and jitted functions in place of interpreted ones; CPU tensors may ask for Triton."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(compiled, "_variants", {})
    for module in (of_columns, of_embeds, of_hidden, of_peaks, of_queries, of_scores):
        for name in ("_prepared", "_prepared_scores"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, PreparedCalls())
    # a public function without the argument `backend`
    monkeypatch.setattr(of_scores, "choose_backend", lambda *_: "triton")
    jitted = []
    for module, name in kernels_that_are_launched():
        kernel = getattr(module, name)
        if not isinstance(kernel, JITFunction):
            kernel = JITFunction(kernel.fn, **kernel.kwargs)
            monkeypatch.setattr(module, name, kernel)
        jitted.append(kernel)
    with pretended_driver(jitted, launched) as pretended:
        pretended.jitted = jitted
        yield pretended


@pytest.fixture
def ordinarily(monkeypatch):
    """Make a call as if none had been made before, and let it take Triton's ordinary way."""

    def run(call):
        with monkeypatch.context() as patched:
            patched.setattr(compiled, "_IS_KNOWN", False)
            patched.setattr(PreparedCalls, "get", lambda *_: None)
            patched.setattr(PreparedCalls, "add", lambda *_: None)
            return call()

    return run


def shifted(tensor):
    """Return an equal tensor that begins one element after a multiple of 16 bytes."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    room[1:] = tensor.reshape(-1)
    return room[1:].view(tensor.shape)


BF16 = torch.bfloat16
TENSORS = {
    "q": torch.randn(1, 4, 3, 16).to(BF16),
    "k": torch.randn(1, 2, 50, 16).to(BF16),
    "w": torch.ones(4),
    "mask": torch.ones(1, 50, dtype=torch.bool),
    "x": torch.randn(1, 50, 32).to(BF16),
    "norm": torch.ones(32, dtype=BF16),
    "wq": torch.randn(64, 32).to(BF16),
    "bq": torch.randn(64).to(BF16),
    "wk": torch.randn(32, 32).to(BF16),
    "bk": torch.randn(32).to(BF16),
    "scores": torch.randn(1, 50),
    "keep": torch.rand(1, 50) < 0.5,
    "positions": torch.arange(50).view(1, 50),
    "features": torch.randn(1, 50, 8),
    "quality": torch.rand(1, 50),
}


def layer_of(t):
    return Layer(t.norm, 1e-6, t.wq, t.bq, t.wk, t.bk)


def _hidden(function, t, *options):
    return function(t.x, layer_of(t), t.w, *options, q_mask=t.keep, k_mask=t.mask, normalize="l2", backend="triton")


# each public function: a call of it, and the tensors that it reads
CALLS = {
    "score_and_select": (lambda t: score_and_select(t.q, t.k, t.w, 0.3, k_mask=t.mask, backend="triton"), "q k w mask"),
    "score_tokens": (lambda t: score_tokens(t.q, t.k, t.w, normalize="l2", backend="triton"), "q k w"),
    "score_peaks": (lambda t: score_peaks(t.q, t.k, t.w, k_mask=t.mask, backend="triton"), "q k w mask"),
    "score_hidden_and_select": (
        lambda t: _hidden(score_hidden_and_select, t, 0.3),
        "x norm wq bq wk bk w keep mask",
    ),
    "score_hidden": (lambda t: _hidden(score_hidden, t), "x norm wq bq wk bk w keep mask"),
    "select_topk": (lambda t: select_topk(t.scores, 7, mask=t.mask), "scores mask"),
    "compact": (
        lambda t: compact(t.x, t.keep, position_ids=t.positions, length=50, backend="triton"),
        "x keep positions",
    ),
    "attention_column_mean": (
        lambda t: attention_column_mean(t.q, t.k, head_weights=t.w, backend="triton"),
        "q k w",
    ),
    "greedy_max_min": (lambda t: greedy_max_min(t.features, 0.2, backend="triton"), "features"),
    "greedy_dpp": (lambda t: greedy_dpp(t.features, t.quality, 0.2, backend="triton"), "features quality"),
}
PREPARED = (
    "score_and_select",
    "score_tokens",
    "score_peaks",
    "score_hidden_and_select",
    "score_hidden",
    "select_topk",
    "compact",
    "attention_column_mean",
)
ALIGNED = SimpleNamespace(**TENSORS)


def is_equal(one, other, inputs):
    """Say whether the driver was told the same twice, but for where the tensors of each call lie."""

    def places(arguments):
        return [
            inputs.get(value, "allocated") if isinstance(value, int) and value > 2**32 else value
            for argument in arguments
            for value in (places(argument) if isinstance(argument, tuple) else [argument])
        ]

    same = ("grid", "stream", "function", "metadata")
    return places(one.arguments) == places(other.arguments) and all(getattr(one, n) == getattr(other, n) for n in same)


def assert_same_launches(some, others, tensors):
    inputs = {tensor.data_ptr(): name for name, tensor in vars(tensors).items()}
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert is_equal(one, other, inputs), (one, other)


@pytest.mark.parametrize("name", CALLS)
def test_a_direct_launch_tells_the_driver_what_an_ordinary_one_does(name, driver, launched, ordinarily):
    call, _ = CALLS[name]
    ordinarily(lambda: call(ALIGNED))
    ordinary = launched.take()
    assert ordinary
    assert not any(launch.is_direct for launch in ordinary)
    call(ALIGNED)
    launched.take()
    for _ in range(3):
        call(ALIGNED)
        direct = launched.take()
        assert all(launch.is_direct for launch in direct)
        assert_same_launches(direct, ordinary, ALIGNED)


@pytest.mark.parametrize(("name", "tensor"), [(name, one) for name, (_, read) in CALLS.items() for one in read.split()])
def test_a_misaligned_tensor_never_reaches_a_kernel_of_aligned_ones(name, tensor, driver, launched, ordinarily):
    """Whichever tensor it is, the kernel is the one that Triton would have taken."""
    call, _ = CALLS[name]
    misaligned = SimpleNamespace(**TENSORS | {tensor: shifted(TENSORS[tensor])})
    assert vars(misaligned)[tensor].data_ptr() % 16 != 0
    expected = {}
    for which, tensors in (("aligned", ALIGNED), ("misaligned", misaligned)):
        ordinarily(lambda tensors=tensors: call(tensors))
        expected[which] = launched.take()
    for _ in range(2):
        for which, tensors in (("aligned", ALIGNED), ("misaligned", misaligned), ("misaligned", misaligned)):
            call(tensors)
            assert_same_launches(launched.take(), expected[which], tensors)
    call(misaligned)
    assert all(launch.is_direct for launch in launched.take())


def test_alignment_makes_another_kernel(driver, launched):
    """What the tests above compare is not always the same."""
    call, _ = CALLS["score_and_select"]
    for _ in range(2):
        for tensors, function in ((ALIGNED, 1), (SimpleNamespace(**TENSORS | {"k": shifted(TENSORS["k"])}), 2)):
            call(tensors)
            assert [launch.function for launch in launched.take()] == [function]


@pytest.fixture
def prompts_on_sm_90(monkeypatch):
    """Calls of all kernels over prompts of any shape, on tensors without memory."""
    cached = (configs.hidden_config, configs.score_config, kernels_of_queries._plan, kernels_of_hidden._plan)
    monkeypatch.setattr(configs, "_config_on", lambda _, *wanted: configs.config_for("sm_90", *wanted))
    for function in cached:
        function.cache_clear()

    def run(launched, model, seed, count):
        """Return what reached the driver, kernel by kernel."""
        draw = random.Random(seed)
        for prompt in few_kernels.prompts(draw, count):
            for call in few_kernels.calls(model, prompt, draw).values():
                call()
        return launched.take()

    yield run
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("model", few_kernels.MODELS)
def test_over_any_stream_of_prompts_the_same_kernels_are_launched(
    model, driver, launched, ordinarily, prompts_on_sm_90
):
    """Ordinary photos, batches and every length: a kernel that Triton has compiled is never looked up again."""
    run = lambda: prompts_on_sm_90(launched, few_kernels.MODELS[model], 3, 40)  # noqa: E731
    ordinary = ordinarily(run)
    num_variants = len(driver.variants)
    for kernel in driver.jitted:
        kernel.device_caches.clear()
    driver.variants.clear()
    mixed = run()
    assert [told(launch) for launch in mixed] == [told(launch) for launch in ordinary]
    assert len(driver.variants) == num_variants
    assert sum(not launch.is_direct for launch in mixed) == num_variants
    assert num_variants < len(mixed) / 10


def some_kernel(pointers, pointer, varying_ptr, number, varying, wide: tl.int64, real, SIZE: tl.constexpr):
    """Has a parameter of each kind."""


SOME_KERNEL = JITFunction(some_kernel, do_not_specialize=("varying_ptr", "varying", "wide"))
INTEGERS = st.sampled_from([0, 1, 2, 15, 16, 17, 32, 48, 100, -16, -1, 2**31 - 1, 2**31, 2**31 + 1, 2**35, 2**35 + 1])
POINTED = [
    tensor
    for dtype in (torch.float32, BF16)
    for tensor in (torch.ones(8, dtype=dtype), shifted(torch.ones(8, dtype=dtype)))
]
LAUNCHES = st.tuples(
    st.tuples(
        st.tuples(st.sampled_from(POINTED), INTEGERS), st.sampled_from(POINTED), st.sampled_from(POINTED),
        INTEGERS, INTEGERS, INTEGERS, st.sampled_from([0.5, 1.0]),
    ),
    st.sampled_from([16, 32]),
    st.sampled_from([4, 8]),
)  # fmt: skip


@settings(max_examples=300)
@given(one=LAUNCHES, other=LAUNCHES, alike=st.sets(st.integers(0, 8)))
def test_a_key_tells_apart_what_triton_tells_apart(one, other, alike):
    """Also of launches that are alike in all but a few arguments."""
    bind = create_function_from_signature(SOME_KERNEL.signature, SOME_KERNEL.params, make_backend(SM_90))
    values = [
        one,
        ([a if i in alike else b for i, (a, b) in enumerate(zip(one[0], other[0], strict=True))], *other[1:]),
    ]
    if 7 in alike:
        values[1] = (values[1][0], one[1], values[1][2])
    if 8 in alike:
        values[1] = (*values[1][:2], one[2])
    ours, tritons = [], []
    with pretended_driver([], lambda *_: None):
        for arguments, size, warps in values:
            constants, options = {"SIZE": size}, {"num_warps": warps}
            ours.append(compiled.variants_of(SOME_KERNEL).key(tuple(arguments), constants, options))
            _, specialization, given_options = bind(*arguments, **constants, **options)
            tritons.append((specialization, given_options))
    assert ours[0] != ours[1] or tritons[0] == tritons[1]
    # nor is a kernel looked up again where it is the same, but for integers whose type is written down
    if values[0][0][5] == values[1][0][5]:
        assert tritons[0] != tritons[1] or ours[0] == ours[1]


@pytest.mark.parametrize("name", PREPARED)
def test_a_second_call_neither_checks_nor_specialises(name, driver, launched, monkeypatch):
    call, _ = CALLS[name]
    expected = call(ALIGNED)

    def refuse(*arguments, **options):
        raise AssertionError("this was done before")

    for module in (of_columns, of_embeds, of_hidden, of_peaks, of_queries, of_scores):
        for function in (
            "_checked",
            "checked_arguments",
            "_check_tensors",
            "_check_embeds",
            "check_mask",
            "checked_keep",
            "check_rounding",
            "load_backend",
        ):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, refuse)
    for module in (kernels_of_queries, kernels_of_hidden, kernels_of_peaks, kernels_of_scores):
        monkeypatch.setattr(module, "make_plan", refuse)
    monkeypatch.setattr(prepared, "keep_arguments", refuse)
    for module in (columns_kernels, compact_kernels):
        monkeypatch.setattr(module, "launch_config", refuse)
    monkeypatch.setattr(compiled._Variants, "key", refuse)
    monkeypatch.setattr(driver, "get_current_target", refuse)
    launched.take()
    got = call(ALIGNED)
    received = launched.take()
    assert received
    assert all(launch.is_direct for launch in received)
    for one, other in zip(as_tuple(got), as_tuple(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def as_tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("name", ["score_and_select", "compact"])
class TestWhoWatches:
    def test_a_chain_of_hooks(self, name, driver, launched):
        call, _ = CALLS[name]
        call(ALIGNED)
        seen = []
        for chain in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
            chain.add(seen.append)
            try:
                launched.take()
                call(ALIGNED)
            finally:
                chain.remove(seen.append)
            assert not launched.take()[0].is_direct
            call(ALIGNED)
            assert launched.take()[0].is_direct

    def test_a_hook_of_its_own(self, name, driver, launched, monkeypatch):
        call, _ = CALLS[name]
        call(ALIGNED)
        launched.take()
        for hook in ("launch_enter_hook", "launch_exit_hook"):
            with monkeypatch.context() as patched:
                patched.setattr(triton.knobs.runtime, hook, lambda metadata: None)
                call(ALIGNED)
            with monkeypatch.context() as patched:
                patched.setattr(triton.knobs.runtime, hook, None)
                call(ALIGNED)
        assert [launch.is_direct for launch in launched.take()] == [False, True] * 2

    def test_what_is_called_before_a_run(self, name, driver, launched):
        call, _ = CALLS[name]
        call(ALIGNED)
        launched.take()
        seen = []
        for kernel in driver.jitted:
            kernel.pre_run_hooks.append(lambda *arguments, **options: seen.append(1))
        call(ALIGNED)
        for kernel in driver.jitted:
            kernel.pre_run_hooks.clear()
        call(ALIGNED)
        assert [launch.is_direct for launch in launched.take()] == [False, True]
        assert len(seen) == 1

    @pytest.mark.parametrize(
        ("where", "knob", "value"),
        [
            ("runtime", "debug", True),
            ("runtime", "add_stages_inspection_hook", lambda: ("key", "hash")),
            ("compilation", "instrumentation_mode", "consan"),
        ],
    )
    def test_a_knob(self, name, where, knob, value, driver, launched, monkeypatch):
        """Triton compiles the kernel anew, and the one that was kept is launched afterwards."""
        call, _ = CALLS[name]
        call(ALIGNED)
        (before,) = launched.take()
        with monkeypatch.context() as patched:
            patched.setattr(getattr(triton.knobs, where), knob, value)
            call(ALIGNED)
            (watched,) = launched.take()
            assert not watched.is_direct
        call(ALIGNED)
        (after,) = launched.take()
        assert after.is_direct
        assert after.function == before.function

    def test_a_function_in_place_of_a_run(self, name, driver, launched, monkeypatch):
        call, _ = CALLS[name]
        call(ALIGNED)
        launched.take()
        runs = []
        with monkeypatch.context() as patched:
            patched.setattr(JITFunction, "run", lambda *arguments, **options: runs.append(1))
            call(ALIGNED)
        assert len(runs) == 1
        assert not launched.take()

    def test_a_release_of_triton_that_nobody_has_read(self, name, driver, launched, monkeypatch):
        call, _ = CALLS[name]
        monkeypatch.setattr(compiled, "_IS_KNOWN", False)
        for _ in range(3):
            call(ALIGNED)
        assert [launch.is_direct for launch in launched.take()] == [False] * 3
        assert not compiled._variants


def test_the_interpreter_is_never_passed_by():
    """Its kernels are no jitted functions."""
    kernel = kernels_of_queries._score_and_select_kernel
    assert compiled.can_launch_directly(kernel) == isinstance(kernel, JITFunction)


@pytest.mark.parametrize("name", CALLS)
def test_device_and_stream_are_those_of_the_moment(name, driver, launched, ordinarily):
    call, _ = CALLS[name]
    driver.streams = {0: 7, 1: 9}
    expected = {}
    for device in (0, 1):
        driver.device = device
        ordinarily(lambda: call(ALIGNED))
        expected[device] = launched.take()
    assert expected[0][0].function != expected[1][0].function
    for device in (0, 1, 0, 1):
        driver.device = device
        call(ALIGNED)
        assert_same_launches(launched.take(), expected[device], ALIGNED)
    driver.streams[1] = 11
    call(ALIGNED)
    assert {(launch.stream, launch.is_direct) for launch in launched.take()} == {(11, True)}


def test_another_driver_has_its_own_kernels(driver, launched):
    call, _ = CALLS["score_and_select"]
    call(ALIGNED)
    call(ALIGNED)
    launched.take()
    others = Launched()
    with pretended_driver(driver.jitted, others) as other:
        call(ALIGNED)
        call(ALIGNED)
        assert [launch.is_direct for launch in others.take()] == [False, True]
        assert len(other.variants) == 1
    assert not launched.take()


def test_a_kept_kernel_outlives_what_triton_forgets(driver, launched, monkeypatch):
    """Newer releases unload a kernel when nobody holds it."""
    call, _ = CALLS["score_and_select"]
    call(ALIGNED)
    unloaded = []
    monkeypatch.setattr(driver.utils, "unload_module", unloaded.append)
    driver.variants.clear()
    for kernel in driver.jitted:
        kernel.device_caches.clear()
    gc.collect()
    call(ALIGNED)
    assert launched.take()[-1].is_direct
    assert not unloaded
    # the pretended driver takes back what it made
    kept = (variants._compiled.values() for variants in compiled._variants.values())
    driver.variants.extend(one.owner for each in kept for one in each)


def test_a_kernel_that_does_not_load_is_not_kept(driver, launched, monkeypatch):
    compile_kernel = driver.compile

    def without_a_module(*arguments, **options):
        made = compile_kernel(*arguments, **options)
        made.module = None
        return made

    monkeypatch.setattr(triton.compiler, "compile", without_a_module)
    # what follows would ask a device for its shared memory
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", None)
    call, _ = CALLS["compact"]
    for _ in range(2):
        call(ALIGNED)
    assert all(not variants._compiled for variants in compiled._variants.values())


@pytest.mark.parametrize("name", PREPARED)
def test_nothing_that_is_kept_holds_a_tensor(name, driver):
    call, _ = CALLS[name]
    tensors = SimpleNamespace(**{key: value.clone() for key, value in TENSORS.items()})
    call(tensors)
    results = as_tuple(call(tensors))
    gone = [weakref.ref(tensor) for tensor in (*vars(tensors).values(), *results)]
    del tensors, results
    gc.collect()
    assert not any(reference() is not None for reference in gone)


def test_many_threads_launch_their_own(driver, launched):
    """Each finds the kernel and the arguments of its own calls, whoever prepared them first."""
    models = [SimpleNamespace(**TENSORS)]
    models += [SimpleNamespace(**TENSORS | {name: shifted(TENSORS[name])}) for name in ("q", "k", "w")]
    call, _ = CALLS["score_and_select"]
    for tensors in models:
        call(tensors)
    functions = [launch.function for launch in launched.take()]
    assert sorted(functions) == [1, 2, 3, 4]
    compiled._variants.clear()
    of_queries._prepared._calls.clear()

    def work(seed):
        draw = random.Random(seed)
        chosen = [draw.randrange(4) for _ in range(200)]
        for index in chosen:
            call(models[index])
        return threading.get_ident(), chosen

    with ThreadPoolExecutor(8) as pool:
        for thread, chosen in dict(pool.map(work, range(8))).items():
            mine = [launch for launch in launched.received if launch.thread == thread]
            for index, launch in zip(chosen, mine[-len(chosen) :], strict=True):
                tensors = models[index]
                assert launch.arguments[0] == tuple(t.data_ptr() for t in (tensors.q, tensors.k, tensors.w))
                assert launch.function == functions[index]


class TestPreparedCalls:
    def test_an_option_counts_with_its_type(self, driver):
        """True equals 1, which equals 1.0."""
        t = ALIGNED
        assert score_and_select(t.q, t.k, t.w, 1, backend="triton").indices.shape == (1, 1)
        assert score_and_select(t.q, t.k, t.w, 1.0, backend="triton").indices.shape == (1, 50)
        with pytest.raises(TypeError, match="r: expected a float"):
            score_and_select(t.q, t.k, t.w, True, backend="triton")
        with pytest.raises(TypeError, match="scale: expected a float"):
            score_and_select(t.q, t.k, t.w, 1, scale=False, backend="triton")
        with pytest.raises(ValueError, match="normalize: expected None"):
            score_and_select(t.q, t.k, t.w, 1, normalize=["l2"], backend="triton")
        with pytest.raises(ValueError, match="rounding: expected 'floor'"):
            score_and_select(t.q, t.k, t.w, 1, rounding="up", backend="triton")

    def test_triton_on_a_cpu_is_refused_where_it_is_no_longer_interpreted(self, driver, monkeypatch):
        call, _ = CALLS["score_and_select"]
        call(ALIGNED)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match="expected tensors on a GPU"):
            call(ALIGNED)

    def test_strides_count(self, driver, launched, ordinarily):
        q = TENSORS["q"].transpose(1, 2).contiguous().transpose(1, 2)
        strided = SimpleNamespace(**TENSORS | {"q": q})
        call, _ = CALLS["score_and_select"]
        call(ALIGNED)
        call(strided)
        direct = launched.take()[-1:]
        ordinarily(lambda: call(strided))
        assert_same_launches(direct, launched.take(), strided)

    @pytest.mark.parametrize("name", PREPARED)
    def test_unbatched(self, name, driver, launched):
        call, _ = CALLS[name]
        unbatched = {key: TENSORS[key][0] for key in ("q", "k", "x", "mask", "keep", "scores", "positions")}
        batched = as_tuple(call(ALIGNED))
        for _ in range(2):
            for one, other in zip(as_tuple(call(SimpleNamespace(**TENSORS | unbatched))), batched, strict=True):
                assert one.shape == other.shape[1:]
        received = launched.take()
        count = len(received) // 3
        first, second, third = (received[start : start + count] for start in range(0, 3 * count, count))
        assert [launch.grid for launch in first] == [launch.grid for launch in second]
        assert [launch.grid for launch in first] == [launch.grid for launch in third]
        assert all(launch.is_direct for launch in third)

    def test_they_are_limited(self):
        calls = PreparedCalls(limit=3)
        for number in range(10):
            calls.add(number, str)
            assert calls.get(number) is str
            assert len(calls) <= 3

    def test_no_signature_no_key(self):
        assert PreparedCalls.key(None, None, 0.2) is None
        assert PreparedCalls().get(None) is None
        assert PreparedCalls().get((["unhashable"],)) is None


def test_every_launch_passes_through_one_function(repository):
    """`kernel[grid](...)` stands in `launch.py` alone."""
    for path in (repository / "hawk_kernels").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = [node.func.value.id for node in calls if is_of_a_name(node.func)]
        launches = [name for name in names if name == "kernel" or name.endswith("_kernel") or name in UNNAMED]
        assert bool(launches) == (path.name == "launch.py"), f"{path}: launch {launches} by `launch.launch`"


UNNAMED = ("_row_pass", "_column_pass", "_finish")


def is_of_a_name(function):
    """Say whether a function is looked up in something that has a name: `name[index]`."""
    return isinstance(function, ast.Subscript) and isinstance(function.value, ast.Name)


def test_variants_are_limited(driver, monkeypatch):
    monkeypatch.setattr(compiled, "_MOST_VARIANTS", 2)
    call, _ = CALLS["compact"]
    for width in (16, 32, 48, 64):
        call(SimpleNamespace(**TENSORS | {"x": torch.randn(1, 50, width)}))
    assert all(len(variants._compiled) <= 2 for variants in compiled._variants.values())


def test_whatever_embeds_need_a_gradient_still_do(driver):
    """`compact` is an operator with a gradient, whatever was prepared for embeddings without one."""
    embeds = torch.randn(1, 50, 32)
    for needs_grad in (False, True, False):
        packed = compact(embeds.requires_grad_(needs_grad), TENSORS["keep"], length=50, backend="triton")
        assert packed.inputs_embeds.requires_grad == needs_grad
    with torch.no_grad():
        assert not compact(embeds, TENSORS["keep"], length=50, backend="triton").inputs_embeds.requires_grad


def test_a_row_that_is_too_long_for_its_length_is_refused_in_every_call(driver):
    fits, does_not = torch.zeros(1, 50, dtype=torch.bool), torch.ones(1, 50, dtype=torch.bool)
    for _ in range(2):
        compact(TENSORS["x"], fits, length=3, backend="triton")
        with pytest.raises(ValueError, match="length: expected at least 50"):
            compact(TENSORS["x"], does_not, length=3, backend="triton")
