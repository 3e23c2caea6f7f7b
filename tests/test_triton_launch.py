"""What the Triton backend does around its kernels: how many launches, what it writes, what it leaves afterwards."""

import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys

import pytest
import torch

from hawk_kernels.backends import kernels
from hawk_kernels.backends.kernels import launch, phases, prepared, score_and_select
from hawk_kernels.backends.kernels import select_topk as select_topk_kernel
from tests.cases import NORMALIZATIONS, make_case


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were launched."""
    names = []

    def counting(kernel):
        class Counting:
            def __getitem__(self, grid):
                names.append(kernel.__name__)
                return kernel[grid]

        return Counting()

    for module, name in ((score_and_select, "_score_and_select_kernel"), (select_topk_kernel, "_select_kernel")):
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    return names


def run(case, normalize):
    q_mask, k_mask = case.options.get("q_mask"), case.options.get("k_mask")
    return score_and_select.score_and_select(case.q, case.k, case.w, 0.3, q_mask, k_mask, normalize, 0.25, "floor")


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("num_keys", [1, 100, 2049, 20000])
def test_one_launch_whatever_the_size(launches, normalize, num_keys, device):
    run(make_case(2, 2, 1, 3, num_keys, 16, masked=True).to(device), normalize)
    assert launches == ["_score_and_select_kernel"]


@pytest.mark.parametrize("num_queries", [1, 64, 3000])
def test_one_launch_whatever_the_text(launches, num_queries, device):
    run(make_case(2, 2, 1, num_queries, 40, 16, masked=True).to(device), "l2")
    assert launches == ["_score_and_select_kernel"]


@pytest.mark.parametrize("num_keys", [1, 2049, 20000])
def test_given_scores_are_selected_in_one_launch(launches, num_keys, device):
    select_topk_kernel.select_topk(torch.randn(2, num_keys, device=device), 0.3, None, "floor")
    assert launches == ["_select_kernel"]


@pytest.mark.parametrize("num_keys", [70, 5000])
def test_poisoned_memory_does_not_show(monkeypatch, num_keys, device):
    """Outputs and workspace come from torch.empty: every byte that is read must have been written."""
    case = make_case(2, 4, 2, 3, num_keys, 16, masked=True).to(device)
    clean = [run(case, normalize) for normalize in NORMALIZATIONS]
    empty = torch.empty

    def poisoned(*size, **options):
        tensor = empty(*size, **options)
        if tensor.dtype.is_floating_point:
            return tensor.fill_(torch.nan)
        return tensor.fill_(True if tensor.dtype == torch.bool else -7)

    monkeypatch.setattr(torch, "empty", poisoned)
    for normalize, expected in zip(NORMALIZATIONS, clean, strict=True):
        for got, want in zip(run(case, normalize), expected, strict=True):
            assert torch.equal(got, want)


def test_nothing_is_written_outside_the_outputs(monkeypatch, device):
    """Outputs in the middle of a larger buffer: the guard zones around them stay as they were."""
    case = make_case(3, 4, 2, 3, 61, 16, masked=True).to(device)
    guards = []
    empty = torch.empty

    def guarded(size, *, dtype, device):
        count = int(torch.Size(size).numel())
        buffer = empty(count + 128, dtype=dtype, device=device).fill_(1)
        guards.append((buffer[:64], buffer[64 + count :]))
        return buffer[64 : 64 + count].view(size)

    monkeypatch.setattr(torch, "empty", guarded)
    for normalize in NORMALIZATIONS:
        run(case, normalize)
    assert len(guards) == 4 * 4
    assert all((zone == 1).all() for pair in guards for zone in pair)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(3, 200), (3000, 200), (3, 5000)])
def test_a_launch_leaves_its_counters_at_zero(monkeypatch, num_queries, num_keys, device):
    counters = torch.zeros(phases.num_counters(3), dtype=torch.int32, device=device)
    monkeypatch.setattr(prepared, "launch_counters", lambda count, device: counters)
    case = make_case(3, 4, 2, num_queries, num_keys, 16).to(device)
    first = run(case, "l2")
    assert counters.eq(0).all()
    for got, expected in zip(run(case, "l2"), first, strict=True):
        assert torch.equal(got, expected)
    select_topk_kernel.select_topk(first.scores, 0.3, None, "floor")
    assert counters.eq(0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnDevice:
    def test_graph_capture_and_replay(self, device):
        case = make_case(2, 28, 4, 20, 1296, 128, dtype=torch.bfloat16).to(device)
        expected = run(case, "l2")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(case, "l2")
        for _ in range(3):
            graph.replay()
            for got, want in zip(captured, expected, strict=True):
                assert torch.equal(got, want)

    def test_two_streams_do_not_share_counters(self, device):
        case = make_case(4, 28, 4, 20, 5120, 128, dtype=torch.bfloat16).to(device)
        expected = run(case, "l2")
        streams = [torch.cuda.Stream() for _ in range(2)]
        results = []
        torch.cuda.synchronize()
        for _ in range(100):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(run(case, "l2"))
        torch.cuda.synchronize()
        for result in results:
            for got, want in zip(result, expected, strict=True):
                assert torch.equal(got, want)

    def test_thousand_runs_are_bitwise_equal(self, device):
        case = make_case(2, 28, 4, 64, 4096, 128, dtype=torch.bfloat16).to(device)
        expected = run(case, "l2")
        for _ in range(1000):
            assert all(torch.equal(got, want) for got, want in zip(run(case, "l2"), expected, strict=True))


def test_counters_on_cpu_are_fresh():
    assert launch.launch_counters(3, torch.device("cpu")).tolist() == [0, 0, 0]


def jitted_functions():
    """Every @triton.jit function of the package, kernels and what they call, by module and name."""
    jitted = type(score_and_select._score_and_select_kernel)
    modules = [
        importlib.import_module(f"{kernels.__name__}.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)
    ]
    return {
        f"{function.fn.__module__}.{function.fn.__name__}": function
        for module in modules
        for function in vars(module).values()
        if isinstance(function, jitted)
    }


MOST_ARGUMENTS = 45


def test_signatures_can_be_read():
    """What belongs together travels in a named tuple."""
    counts = {name: len(inspect.signature(function.fn).parameters) for name, function in jitted_functions().items()}
    assert counts[f"{score_and_select.__name__}._score_and_select_kernel"] > 0
    assert len(counts) > 40
    too_many = {name: count for name, count in counts.items() if count > MOST_ARGUMENTS}
    assert not too_many


def test_compiles_without_a_device(repository, tmp_path, capsys):
    """Run real compilers for four targets: nothing spills, and a barrier stands between the stores and the arrival.

    These are few variants; `make compile` takes all of them.
    """
    report = tmp_path / "compiled.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "bench.compile_only", "--quick", "--json", str(report)],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    with capsys.disabled():
        print(f"\n{result.stdout}")
    rows = json.loads(report.read_text())["rows"]
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(row["spills"] == 0 for row in rows), [row for row in rows if row["spills"]]
    waiting = [row for row in rows if row["variant"].startswith(("score_and_select", "score_hidden", "select"))]
    assert len(waiting) == 3 * 4
    assert all(row["violations"] == [] for row in waiting), [row for row in waiting if row["violations"] != []]
