"""What happens when something is wrong: memory, interrupts, sizes, strides, devices. It works, or says what to do."""

import threading
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from hawk_kernels import (
    attention_column_mean,
    free_workspaces,
    score_and_select,
    score_hidden,
    score_hidden_and_select,
    score_tokens,
    select_topk,
)
from hawk_kernels.backends.kernels import finish, launch
from hawk_kernels.backends.kernels import score_and_select as score_and_select_kernel
from hawk_kernels.backends.kernels import score_hidden as score_hidden_kernel
from hawk_kernels.backends.kernels import select_topk as select_topk_kernel
from hawk_kernels.backends.kernels.configs import HiddenConfig, ScoreConfig
from tests.cases import NORMALIZATIONS, assert_matches_reference, make_case
from tests.test_score_hidden import HiddenCase

BACKENDS = ("torch", "triton")
GPU = torch.device("cuda", 0)


def queries_and_keys(num_keys=70, **options):
    case = make_case(2, 4, 2, 3, num_keys, 16, masked=True)
    return score_and_select(case.q, case.k, case.w, 0.3, backend="triton", **case.options, **options)


def hidden_states(num_tokens=70, **options):
    layer = HiddenCase(num_tokens=num_tokens)
    return score_hidden_and_select(*layer.arguments(), 0.3, **layer.options(), backend="triton", **options)


def given_scores(num_keys=70):
    return select_topk_kernel.select_topk(torch.linspace(1, 2, 2 * num_keys).view(2, -1), 0.3, None, "floor")


CALLS = [queries_and_keys, hidden_states, given_scores]


def assert_same(selection, expected):
    for got, want in zip(selection, expected, strict=True):
        assert torch.equal(got, want)


class TestHostFailures:
    """A call that fails at any point leaves nothing that the next one could stumble over."""

    @pytest.mark.parametrize("call", CALLS)
    def test_out_of_memory_at_any_allocation(self, call, monkeypatch):
        expected = call()
        empty, failures = torch.empty, 0

        for failing in range(20):
            count = 0

            def allocate(*size, failing=failing, **options):
                nonlocal count
                count += 1
                if count == failing + 1:
                    raise torch.OutOfMemoryError("out of memory. Tried to allocate 2.00 GiB")
                return empty(*size, **options)

            monkeypatch.setattr(torch, "empty", allocate)
            try:
                call()
            except torch.OutOfMemoryError:
                failures += 1
                monkeypatch.setattr(torch, "empty", empty)
                assert_same(call(), expected)
            else:
                break
        # indices and workspace at least
        assert failures >= 2

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize("call", CALLS)
    def test_a_launch_that_does_not_come_about(self, call, error, monkeypatch):
        expected = call()

        class Failing:
            def __getitem__(self, grid):
                raise error("before the launch")

        with monkeypatch.context() as patched:
            for module in (score_and_select_kernel, score_hidden_kernel, select_topk_kernel):
                names = [name for name in vars(module) if name.startswith("_") and name.endswith("_kernel")]
                for name in names:
                    patched.setattr(module, name, Failing())
            with pytest.raises(error, match="before the launch"):
                call()
        assert_same(call(), expected)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """`launch` on a device that is not there: its memory is the CPU's, `current` says which stream is current."""
    for name in ("_eager_counters", "_eager_workspaces", "_captured_slabs", "_last_external_launches"):
        monkeypatch.setattr(launch, name, {})
    zeros, new_workspace = launch._zeros, launch._new_workspace
    current = SimpleNamespace(stream=7, capturing=False, device=0, allocating=[], happened=[])

    def remembering(allocate):
        def run(*arguments):
            current.allocating.append(threading.current_thread())
            return allocate(*arguments[:-1], torch.device("cpu"))

        return run

    monkeypatch.setattr(launch, "_zeros", remembering(zeros))
    monkeypatch.setattr(launch, "_new_workspace", remembering(new_workspace))
    monkeypatch.setattr(launch, "_current_stream", lambda device: current.stream)

    def happens(what):
        return lambda *arguments: current.happened.append((what, *arguments, threading.current_thread()))

    def event():
        made = SimpleNamespace(synchronize=happens("synchronise event"))
        made.record = lambda stream: current.happened.append(("record", made))
        return made

    stream = SimpleNamespace(synchronize=happens("synchronise stream"))
    stream.wait_event = lambda event: current.happened.append(("wait", event))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", event)
    library = SimpleNamespace(cuThreadExchangeStreamCaptureMode=lambda mode: happens("mode")(mode._obj.value))
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current.capturing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.device)
    return current


class TestKeptMemory:
    def test_a_stream_keeps_its_counters_and_another_has_its_own(self, pretended_gpu):
        first = launch.launch_counters(17, GPU)
        assert launch.launch_counters(33, GPU) is first
        pretended_gpu.stream = 9
        assert launch.launch_counters(17, GPU) is not first
        pretended_gpu.stream = 7
        assert launch.launch_counters(17, GPU) is first

    def test_more_rows_get_more_counters_all_zero(self, pretended_gpu):
        launch.launch_counters(17, GPU)
        larger = launch.launch_counters(5000, GPU)
        assert larger.numel() >= 5000
        assert larger.eq(0).all()

    def test_workspace_is_kept_and_grows_in_both_parts(self, pretended_gpu):
        floats, _ = launch.workspace(100, 10, GPU)
        assert launch.workspace(200, 0, GPU)[0] is floats
        more_floats, more_words = launch.workspace(100, 100_000, GPU)
        assert more_words.numel() >= 100_000
        assert more_floats.numel() >= floats.numel()
        kept = launch.workspace(100_000, 100_000, GPU)
        assert launch.workspace(1, 1, GPU)[0] is kept[0]
        assert (kept[0].dtype, kept[1].dtype) == (torch.float32, torch.int32)

    def test_the_two_parts_of_a_workspace_do_not_overlap(self, pretended_gpu):
        floats, words = launch.workspace(70_001, 90_001, GPU)
        floats[:70_001].fill_(1.5)
        words[:90_001].fill_(-7)
        assert floats[:70_001].eq(1.5).all()
        assert words[:90_001].eq(-7).all()
        assert floats.data_ptr() % 16 == words.data_ptr() % 16 == 0

    def test_a_large_workspace_is_not_kept(self, pretended_gpu):
        launch.workspace(launch._LARGEST_KEPT_WORDS, 1, GPU)
        assert not launch._eager_workspaces

    def test_kept_memory_does_not_come_from_a_pool_of_the_caller(self, pretended_gpu):
        """Such a pool is bound to the thread: a CUDA graph's warm-up would hand the memory out again."""
        launch.launch_counters(17, GPU)
        launch.workspace(100, 10, GPU)
        assert pretended_gpu.allocating
        assert threading.current_thread() not in pretended_gpu.allocating

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
    def test_memory_that_cannot_be_had_leaves_what_was_kept(self, pretended_gpu, monkeypatch, error):
        counters, (floats, _) = launch.launch_counters(17, GPU), launch.workspace(100, 10, GPU)

        def fail(*arguments):
            raise error("out of memory")

        with monkeypatch.context() as patched:
            patched.setattr(launch, "_zeros", fail)
            patched.setattr(launch, "_new_workspace", fail)
            with pytest.raises(error, match="out of memory"):
                launch.launch_counters(10**5, GPU)
            with pytest.raises(error, match="out of memory"):
                launch.workspace(10**6, 10, GPU)
        assert launch.launch_counters(17, GPU) is counters
        assert launch.workspace(100, 10, GPU)[0] is floats

    def test_threads_of_one_stream_share(self, pretended_gpu):
        launch.launch_counters(17, GPU)
        found = []
        threads = [threading.Thread(target=lambda: found.append(launch.launch_counters(17, GPU))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({counters.data_ptr() for counters in found}) == 1


def pretended_launch(count=17):
    """What a call does around its kernel; returns the counters that it gave to the kernel."""
    with launch.on_device(GPU):
        return launch.launch_counters(count, GPU)


class TestStreamsOfOthers:
    """PyTorch knows a stream that it did not make by its handle, which is even and may come to mean another stream."""

    HANDLE = 0x55D0

    def test_a_launch_waits_for_the_one_before_on_the_same_handle(self, pretended_gpu):
        pretended_gpu.stream = self.HANDLE
        for _ in range(3):
            pretended_launch()
        (first, one), (second, waited), (third, two), (fourth, waited_again), (fifth, _) = [
            entry for entry in pretended_gpu.happened if entry[0] in ("record", "wait")
        ]
        assert [first, second, third, fourth, fifth] == ["record", "wait", "record", "wait", "record"]
        assert waited is one
        assert waited_again is two

    def test_a_launch_that_fails_is_waited_for_too(self, pretended_gpu):
        """The kernel may have been launched before the error, an interrupt for example."""
        pretended_gpu.stream = self.HANDLE
        with pytest.raises(KeyboardInterrupt), launch.on_device(GPU):
            raise KeyboardInterrupt
        pretended_launch()
        assert [entry[0] for entry in pretended_gpu.happened if entry[0] in ("record", "wait")][:2] == [
            "record",
            "wait",
        ]

    def test_threads_do_not_share(self, pretended_gpu):
        """The per-thread default stream has one handle for all threads, and is another stream in each of them."""
        pretended_gpu.stream = 2
        found = [pretended_launch()]
        thread = threading.Thread(target=lambda: found.append(pretended_launch()))
        thread.start()
        thread.join()
        assert found[0].data_ptr() != found[1].data_ptr()

    def test_nothing_is_recorded_in_a_capture(self, pretended_gpu):
        pretended_gpu.stream, pretended_gpu.capturing = self.HANDLE, True
        pretended_launch()
        assert not pretended_gpu.happened

    @pytest.mark.parametrize("stream", [0, 7, 9])
    def test_pytorchs_own_streams_need_no_events(self, pretended_gpu, stream):
        pretended_gpu.stream = stream
        for _ in range(2):
            pretended_launch()
        assert not {"record", "wait"} & {entry[0] for entry in pretended_gpu.happened}


class TestFreeingKeptMemory:
    def test_everything_kept_is_freed_and_counted(self, pretended_gpu):
        free_workspaces()  # what the PyTorch path of earlier tests has kept
        counters = launch.launch_counters(5000, GPU)
        floats, _ = launch.workspace(10**5, 10, GPU)
        assert free_workspaces() == counters.untyped_storage().nbytes() + floats.untyped_storage().nbytes()
        assert free_workspaces() == 0
        assert launch.launch_counters(17, GPU) is not counters
        assert launch.launch_counters(17, GPU).eq(0).all()

    def test_counters_of_captured_graphs_stay(self, pretended_gpu):
        launch.launch_counters(17, GPU)
        pretended_gpu.capturing = True
        before = launch.launch_counters(17, GPU)
        free_workspaces()
        assert launch.launch_counters(17, GPU).data_ptr() > before.data_ptr()

    def test_launches_on_streams_of_others_have_ended_before(self, pretended_gpu):
        pretended_gpu.stream = TestStreamsOfOthers.HANDLE
        pretended_launch()
        free_workspaces()
        assert pretended_gpu.happened[-1][0] == "synchronise event"


class TestCapturedMemory:
    def test_the_first_eager_call_does_not_disturb_a_capture_in_another_thread(self, pretended_gpu):
        """The thread that waits for the zeros has left the mode in which another thread's capture forbids that."""
        launch.launch_counters(17, GPU)
        (waiting,) = [entry[-1] for entry in pretended_gpu.happened if entry[0] == "synchronise stream"]
        assert waiting is not threading.current_thread()
        of_that_thread = [entry[:-1] for entry in pretended_gpu.happened if entry[-1] is waiting]
        assert of_that_thread == [("mode", 2), ("synchronise stream",)]

    def test_a_library_without_capture_modes_is_no_error(self, pretended_gpu, monkeypatch):
        def missing(name):
            raise OSError(name)

        monkeypatch.setattr(launch.ctypes, "CDLL", missing)
        assert launch.launch_counters(17, GPU).eq(0).all()

    def test_no_two_captured_launches_share_counters(self, pretended_gpu):
        eager = launch.launch_counters(17, GPU)
        pretended_gpu.capturing = True
        captured = [launch.launch_counters(count, GPU) for count in (17, 1, 33, 17)]
        ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + 4 * tensor.numel()) for tensor in (eager, *captured))
        assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))
        assert all(tensor.numel() >= count for tensor, count in zip(captured, (17, 1, 33, 17)))

    def test_they_are_as_aligned_as_eager_ones(self, pretended_gpu):
        """Triton compiles anew for pointers that are not multiples of 16, and a capture is no time for that."""
        launch.launch_counters(17, GPU)
        pretended_gpu.capturing = True
        starts = [launch.launch_counters(17, GPU).storage_offset() * 4 for _ in range(5)]
        assert all(start % 16 == 0 for start in starts)

    def test_where_none_are_left_they_are_zeroed_in_the_graph(self, pretended_gpu):
        launch.launch_counters(17, GPU)
        pretended_gpu.capturing = True
        launch.launch_counters(launch._CAPTURED_COUNTERS, GPU)
        ours = len(pretended_gpu.allocating)
        assert launch.launch_counters(17, GPU).eq(0).all()
        # by the caller, whose allocations the graph records
        assert pretended_gpu.allocating[ours:] == [threading.current_thread()]

    def test_a_capture_without_an_eager_call_before_it(self, pretended_gpu):
        pretended_gpu.capturing = True
        counters = launch.launch_counters(17, GPU)
        assert counters.numel() >= 17
        assert counters.eq(0).all()

    def test_workspace_is_the_graphs_own(self, pretended_gpu):
        kept, _ = launch.workspace(100, 10, GPU)
        pretended_gpu.capturing = True
        captured, _ = launch.workspace(100, 10, GPU)
        assert captured.data_ptr() != kept.data_ptr()
        assert pretended_gpu.allocating[-1] is threading.current_thread()


class TestOtherDevice:
    def test_the_launch_goes_to_the_tensors_device(self, pretended_gpu, monkeypatch):
        entered = []
        monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
        with launch.on_device(GPU):
            pass
        assert entered == []
        pretended_gpu.device = 1
        with launch.on_device(GPU):
            pass
        assert entered == [GPU]

    def test_nothing_to_do_on_a_cpu(self):
        with launch.on_device(torch.device("cpu")):
            pass


class TestLimits:
    def test_more_programs_than_a_grid_has(self):
        with pytest.raises(ValueError, match=r"at most 2147483647 programs in a launch, got \d+; split the batch"):
            score_and_select_kernel.make_plan(2**27, 28, 4, 1, 64, 16, None, True, ScoreConfig())
        with pytest.raises(ValueError, match=r"programs in a launch, got \d+; split the batch"):
            score_hidden_kernel.make_plan(2**26, 64, 64, 4, 4, 16, None, True, HiddenConfig())

    def test_offsets_that_int32_does_not_hold(self):
        with pytest.raises(ValueError, match=r"numbers of queries in the workspace in a launch, got \d+; split the"):
            score_and_select_kernel.make_plan(2**19, 32, 4, 64, 64, 128, "l2", True, ScoreConfig())
        with pytest.raises(ValueError, match="numbers of queries in the workspace"):
            score_hidden_kernel.make_plan(2**14, 64, 4096, 32, 8, 128, "l2", True, HiddenConfig())

    def test_more_rows_than_have_counters(self):
        """The counters of a row are found by an int32 offset, which would wrap around."""
        most = 2**26 - 2
        select_topk_kernel.make_plan(most, 1)
        with pytest.raises(ValueError, match=rf"at most {most} rows in a launch, got {most + 1}; split the batch"):
            select_topk_kernel.make_plan(most + 1, 1)

    def test_rows_longer_than_a_selection_takes(self):
        with pytest.raises(ValueError, match="at most 1073741824 tokens in a row in a launch, got 1073741825"):
            score_and_select_kernel.make_plan(1, 4, 4, 1, 2**30 + 1, 16, None, True, ScoreConfig())

    @pytest.mark.parametrize(("batch", "num_keys"), [(64, 262144), (1, 4 * 10**6), (4096, 1296)])
    def test_what_people_have_is_far_below(self, batch, num_keys):
        plan = score_and_select_kernel.make_plan(batch, 28, 4, 64, num_keys, 128, "l2", True, ScoreConfig())
        assert plan.grid[0] < 2**31
        score_hidden_kernel.make_plan(min(batch, 512), num_keys, 3584, 28, 4, 128, "l2", True, HiddenConfig())


def far_apart(values, strides):
    """The same values, so far apart that an int32 offset would not reach them; pages nobody touches cost nothing."""
    count = 1 + sum(stride * (length - 1) for stride, length in zip(strides, values.shape))
    try:
        storage = torch.empty(count, dtype=values.dtype)
    except RuntimeError:
        pytest.skip(f"cannot reserve {count * values.element_size() >> 30} GiB of address space")
    return storage.as_strided(values.shape, strides).copy_(values)


FAR = 2**31


class TestFarOffsets:
    """B*H*M*D above 2**31, as the strides of small tensors."""

    @pytest.mark.parametrize(
        "strides", [(FAR, 64, 16, 1), (16, FAR, 32, 1), (32, 64, FAR // 2, 1), (16, 32, 64, FAR // 8)]
    )
    @pytest.mark.parametrize("name", ["q", "k"])
    def test_queries_and_keys(self, name, strides):
        case = make_case(2, 2, 2, 3, 3, 16, torch.float16)
        expected = score_and_select(case.q, case.k, case.w, 0.5, normalize="l2", backend="triton")
        setattr(case, name, far_apart(getattr(case, name), strides))
        assert_same(score_and_select(case.q, case.k, case.w, 0.5, normalize="l2", backend="triton"), expected)

    @pytest.mark.parametrize("normalize", [None, "l2"])
    def test_head_weights(self, normalize):
        case = make_case(1, 4, 2, 3, 9, 16)
        case.w = case.w.half()
        options = {"normalize": normalize, "backend": "triton"}
        expected = score_and_select(case.q, case.k, case.w, 0.5, **options)
        assert_same(score_and_select(case.q, case.k, far_apart(case.w, (FAR // 2 - 8,)), 0.5, **options), expected)

    @pytest.mark.parametrize("name", ["q_mask", "k_mask"])
    @pytest.mark.parametrize("strides", [(FAR, 1), (1, FAR // 2)])
    def test_masks(self, name, strides):
        case = make_case(2, 2, 2, 3, 3, 16, masked=True)
        expected = score_and_select(case.q, case.k, case.w, 0.5, **case.options, backend="triton")
        case.options[name] = far_apart(case.options[name], strides)
        assert_same(score_and_select(case.q, case.k, case.w, 0.5, **case.options, backend="triton"), expected)

    @pytest.mark.parametrize(
        ("name", "strides"),
        [
            ("x", (FAR, 16, 1)),
            ("x", (16, FAR // 4, 1)),
            ("x", (16, 32, FAR // 8)),
            ("wq", (FAR // 16, 1)),
            ("wk", (16, FAR // 8)),
            ("bq", (FAR // 16,)),
            ("bk", (FAR // 8,)),
            ("norm_weight", (FAR // 8,)),
            ("w", (FAR // 2 - 8,)),
        ],
    )
    def test_hidden_states_and_weights(self, name, strides):
        case = HiddenCase(2, 9, 16, 4, 2, 16, torch.float16)
        case.w = case.w.half()

        def run():
            return score_hidden_and_select(*case.arguments(), 0.5, **case.options(), normalize="l2", backend="triton")

        expected = run()
        case.change(name, lambda tensor: far_apart(tensor, strides))
        assert_same(run(), expected)

    @pytest.mark.parametrize(
        ("name", "strides"),
        [
            ("q", (FAR, 64, 16, 1)),
            ("q", (16, FAR, 32, 1)),
            ("k", (32, 64, FAR // 2, 1)),
            ("k", (16, 32, 64, FAR // 8)),
            ("q", (16, 32, 64, FAR // 8)),
            ("q_rows", (1, FAR // 2)),
            ("head_weights", (FAR - 8,)),
        ],
    )
    def test_attention_statistics(self, name, strides):
        case = make_case(2, 2, 2, 3, 3, 16, torch.float16)
        arguments = {"q": case.q, "k": case.k, "q_rows": torch.rand(2, 3) < 0.8, "head_weights": case.w.half()}
        expected = attention_column_mean(**arguments, backend="triton")
        arguments[name] = far_apart(arguments[name], strides)
        assert torch.equal(attention_column_mean(**arguments, backend="triton"), expected)


def strided(tensor):
    """The same values, every other element of a larger tensor, its dimensions the other way round in memory."""
    reversed_dimensions = tensor.permute(*reversed(range(tensor.dim()))).contiguous()
    doubled = torch.stack([reversed_dimensions, torch.full_like(reversed_dimensions, 0)], -1)[..., 0]
    return doubled.permute(*reversed(range(tensor.dim())))


@pytest.mark.parametrize("backend", BACKENDS)
class TestStrides:
    @pytest.mark.parametrize("normalize", NORMALIZATIONS)
    def test_queries_and_keys_in_any_order(self, backend, normalize):
        case = make_case(2, 4, 2, 3, 37, 16, masked=True, normalize=normalize)
        expected = score_and_select(case.q, case.k, case.w, 0.3, **case.options, backend=backend)
        case.q, case.k, case.w = strided(case.q), strided(case.k), strided(case.w)
        case.options["q_mask"], case.options["k_mask"] = (
            strided(case.options["q_mask"]),
            strided(case.options["k_mask"]),
        )
        assert not any(tensor.is_contiguous() for tensor in (case.q, case.k, case.w, case.options["k_mask"]))
        selection = score_and_select(case.q, case.k, case.w, 0.3, **case.options, backend=backend)
        assert_matches_reference(case, selection)
        if backend == "triton":
            assert_same(selection, expected)

    def test_expanded_queries_and_keys(self, backend):
        case = make_case(1, 4, 1, 1, 37, 16)
        case.q, case.k = case.q.expand(3, -1, 5, -1), case.k.expand(3, 2, -1, -1)
        case.w = torch.ones(1).expand(4)
        case.options["k_mask"] = (torch.arange(37) % 3 > 0).expand(3, -1)
        assert 0 in case.k.stride()
        assert_matches_reference(case, score_and_select(case.q, case.k, case.w, 0.3, **case.options, backend=backend))

    def test_hidden_states_and_weights_in_any_order(self, backend):
        case = HiddenCase()
        expected = score_hidden_and_select(*case.arguments(), 0.3, **case.options(), backend=backend)
        for name in ("x", "norm_weight", "wq", "bq", "wk", "bk", "w", "q_mask", "k_mask"):
            case.change(name, strided)
        selection = score_hidden_and_select(*case.arguments(), 0.3, **case.options(), backend=backend)
        assert torch.allclose(selection.scores, expected.scores, rtol=1e-5, atol=1e-5)
        assert torch.equal(selection.mask, expected.mask)

    def test_expanded_hidden_states(self, backend):
        layer = HiddenCase(batch=1)
        expected = score_hidden_and_select(*layer.arguments(), 0.3, **layer.options(), backend=backend)
        for name in ("x", "q_mask", "k_mask"):
            value = getattr(layer, name)
            setattr(layer, name, value.expand(3, *value.shape[1:]))
        selection = score_hidden_and_select(*layer.arguments(), 0.3, **layer.options(), backend=backend)
        for got, want in zip(selection, expected, strict=True):
            assert torch.allclose(got.float(), want.float().expand_as(got))

    def test_given_scores(self, backend):
        scores = strided(torch.randn(3, 50))
        run = select_topk_kernel.select_topk if backend == "triton" else None
        selection = run(scores, 0.3, None, "floor") if run else select_topk(scores, 0.3)
        assert_same(selection, select_topk(scores.contiguous(), 0.3))


@pytest.mark.parametrize("backend", BACKENDS)
class TestNothingThere:
    @pytest.mark.parametrize("normalize", NORMALIZATIONS)
    @pytest.mark.parametrize(
        ("batch", "num_queries", "num_keys"), [(0, 3, 7), (2, 3, 0), (2, 0, 7), (0, 0, 0), (2, 0, 0)]
    )
    def test_rows_queries_keys(self, backend, batch, num_queries, num_keys, normalize):
        case = make_case(batch, 4, 2, num_queries, num_keys, 16)
        options = {"normalize": normalize, "backend": backend}
        mask, indices, scores = score_and_select(case.q, case.k, case.w, 0.5, **options)
        assert (mask.shape, scores.shape) == ((batch, num_keys), (batch, num_keys))
        assert indices.shape == (batch, 3 if num_keys else 0)
        assert mask.sum() == indices.numel()
        # without text every score is that of c = 0, so ties go to the lowest indices
        if batch and num_keys and not num_queries:
            assert indices.tolist() == [[0, 1, 2]] * batch
        assert torch.equal(score_tokens(case.q, case.k, case.w, **options), scores)

    @pytest.mark.parametrize(("batch", "num_tokens"), [(0, 7), (2, 0), (0, 0)])
    def test_hidden_states(self, backend, batch, num_tokens):
        layer = HiddenCase(batch=batch, num_tokens=num_tokens)
        mask, indices, scores = score_hidden_and_select(*layer.arguments(), 0.5, **layer.options(), backend=backend)
        assert mask.shape == scores.shape == (batch, num_tokens)
        assert indices.shape[0] == batch
        assert not mask.any()
        assert score_hidden(*layer.arguments(), **layer.options(), backend=backend).shape == (batch, num_tokens)

    @pytest.mark.parametrize("empty", ["q_mask", "k_mask"])
    def test_hidden_states_without_text_or_without_candidates(self, backend, empty):
        layer = HiddenCase(batch=2)
        getattr(layer, empty)[1] = False
        mask, _, scores = score_hidden_and_select(*layer.arguments(), 0.5, **layer.options(), backend=backend)
        assert torch.isfinite(scores[1]).equal(layer.k_mask[1])
        assert mask[1].sum() == (layer.k_mask[1].sum() // 2)
        assert scores[1][layer.k_mask[1]].eq(0).all()

    @pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
    def test_given_scores(self, backend, shape):
        run = (
            select_topk_kernel.select_topk
            if backend == "triton"
            else lambda scores, r, mask, rounding: select_topk(scores, r)
        )
        mask, indices, scores = run(torch.empty(shape), 0.5, None, "floor")
        assert mask.shape == scores.shape == shape
        assert indices.shape[0] == shape[0]


@pytest.fixture
def guarded(monkeypatch):
    """Every tensor from `torch.empty` lies between guard zones; `check` says whether they are as they were."""
    zones, empty = [], torch.empty

    def allocate(size, *, dtype, device):
        count = int(torch.Size([size] if isinstance(size, int) else size).numel())
        buffer = empty(count + 256, dtype=dtype, device=device).fill_(1)
        zones.append((buffer[:128], buffer[128 + count :]))
        return buffer[128 : 128 + count].view(size)

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(
        torch,
        "empty_like",
        lambda other, dtype=None: allocate(other.shape, dtype=dtype or other.dtype, device=other.device),
    )

    def check(at_least):
        assert len(zones) >= at_least
        assert all((zone == 1).all() for pair in zones for zone in pair)

    return check


class TestGuardZones:
    ROW = finish.MAX_ROW_IN_REGISTERS

    @pytest.mark.parametrize(
        ("num_keys", "head_dim"), [(1, 16), (61, 72), (256, 16), (257, 16), (ROW - 1, 16), (ROW + 1, 16)]
    )
    @pytest.mark.parametrize("normalize", [None, "softmax"])
    def test_queries_and_keys(self, guarded, num_keys, head_dim, normalize, device):
        case = make_case(2, 3, 1, 5, num_keys, head_dim, masked=True).to(device)
        score_and_select(case.q, case.k, case.w, 0.7, normalize=normalize, **case.options, backend="triton")
        score_tokens(case.q, case.k, case.w, normalize=normalize, **case.options, backend="triton")
        guarded(6)

    @pytest.mark.parametrize(
        ("num_tokens", "hidden_size", "head_dim"), [(1, 16, 16), (61, 50, 72), (257, 129, 16), (ROW + 3, 17, 5)]
    )
    @pytest.mark.parametrize("normalize", [None, "softmax"])
    def test_hidden_states(self, guarded, num_tokens, hidden_size, head_dim, normalize, device):
        layer = HiddenCase(2, num_tokens, hidden_size, 3, 1, head_dim)
        arguments, options = layer.arguments(device=device), layer.options(device)
        score_hidden_and_select(*arguments, 0.7, **options, normalize=normalize, backend="triton")
        guarded(5)

    @pytest.mark.parametrize("num_keys", [1, 61, 255, 257, ROW - 1, ROW + 1, 3 * ROW + 7])
    @pytest.mark.parametrize("r", [1, 0.3, 1.0])
    def test_given_scores(self, guarded, num_keys, r, device):
        select_topk_kernel.select_topk(torch.randn(3, num_keys, device=device), r, None, "ceil")
        guarded(4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnDevice:
    def case(self, device):
        return make_case(2, 28, 4, 20, 5120, 128, torch.bfloat16).to(device)

    def run(self, case):
        return score_and_select(case.q, case.k, case.w, 0.3, normalize="l2", backend="triton")

    def test_an_error_inside_a_capture_spoils_neither_the_next_capture_nor_eager_calls(self, device):
        case = self.case(device)
        expected = self.run(case)

        def capture(spoil):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = self.run(case)
                if spoil:
                    captured.scores.sum().item()  # waits for the device, which a capture cannot
            return graph, captured

        with pytest.raises(RuntimeError):
            capture(spoil=True)
        torch.cuda.synchronize()
        assert_same(self.run(case), expected)
        graph, captured = capture(spoil=False)
        for _ in range(3):
            graph.replay()
            assert_same(captured, expected)

    def test_two_graphs_replayed_at_once(self, device):
        case = self.case(device)
        expected = self.run(case)
        graphs = []
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                graphs.append((graph, self.run(case), torch.cuda.Stream()))
        torch.cuda.synchronize()
        for _ in range(50):
            for graph, _, stream in graphs:
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for _, captured, _ in graphs:
            assert_same(captured, expected)

    def test_out_of_memory_and_then_again(self, device):
        case = self.case(device)
        expected = self.run(case)
        k = case.k[:, :, :1].expand(-1, -1, 2**29, -1)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.set_per_process_memory_fraction(0.02, device)
        try:
            with pytest.raises(torch.OutOfMemoryError):
                score_and_select(case.q, k, case.w, 0.3, normalize="l2", backend="triton")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        assert torch.cuda.memory_allocated(device) == held
        assert_same(self.run(case), expected)

    def test_threads_on_their_own_streams(self, device):
        case = self.case(device)
        expected = self.run(case)
        torch.cuda.synchronize()
        wrong = []

        def work():
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    selection = self.run(case)
                    torch.cuda.current_stream().synchronize()
                    if not all(torch.equal(got, want) for got, want in zip(selection, expected, strict=True)):
                        wrong.append(threading.current_thread().name)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_keys_beyond_int32(self, device):
        num_keys = 2**24 + 5
        k = torch.zeros(1, 2, num_keys, 128, dtype=torch.bfloat16, device=device)
        assert k.numel() > 2**32
        k[0, :, -1] = 1
        q = torch.ones(1, 2, 1, 128, dtype=torch.bfloat16, device=device)
        selection = score_and_select(q, k, torch.ones(2, device=device), 1, backend="triton")
        assert selection.indices.tolist() == [[num_keys - 1]]

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
    def test_a_device_other_than_the_current_one(self, device):
        case = self.case(torch.device("cuda", 1))
        expected = self.run(self.case(device))
        assert torch.cuda.current_device() == 0
        assert_same([tensor.to(device) for tensor in self.run(case)], expected)
        assert torch.cuda.current_device() == 0
