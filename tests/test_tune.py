"""`python -m hawk_kernels.tune`: what it tries, what it refuses to time, what it writes, and how it goes on."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import triton.testing

from hawk_kernels import tune
from hawk_kernels.backends.kernels import config_tables, configs, score_and_select, score_hidden
from hawk_kernels.backends.kernels.configs import Shape

CPU = torch.device("cpu")


def command(repository, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "hawk_kernels.tune", *arguments], cwd=repository, capture_output=True, text=True
    )


def test_dry_run_lists_candidates_and_checks_some(repository):
    result = command(repository, "--dry-run", "--quick", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert set(report["listed"]) == {"score_and_select", "score_hidden"}
    assert report["listed"]["score_hidden"]["candidates"]["half"] == tune.candidates("score_hidden", "half", quick=True)
    assert {check["kernel"] for check in report["checked"]} == {"score_and_select", "score_hidden"}
    assert not [check for check in report["checked"] if check["refused"]]
    assert "selects the same as PyTorch" in result.stderr


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--out", "--kernel", "--quick", "--fresh", "--dry-run", "--json"))


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "expected a CUDA or ROCm device, found none" in capsys.readouterr().err


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("kernel", ["score_and_select", "score_hidden"])
class TestWhatIsTried:
    def test_candidates_are_what_tables_have(self, kernel, quick):
        for dtype in ("half", "fp32"):
            tried = tune.candidates(kernel, dtype, quick)
            assert len({json.dumps(config, sort_keys=True) for config in tried}) == len(tried) >= 4
            for config in tried:
                assert config_tables.checked_config(kernel, config) == config

    def test_shapes_are_different_and_cover_short_and_long_rows(self, kernel, quick):
        shapes = tune.shapes(kernel, quick)
        assert len(set(shapes)) == len(shapes)
        assert min(shape.tokens for shape in shapes) <= 1296 < 65536 < max(shape.tokens for shape in shapes)


TINY_SHAPES = {"score_and_select": Shape("half", 16, 2, 40), "score_hidden": Shape("fp32", 16, 1, 40)}


@pytest.mark.parametrize("kernel", ["score_and_select", "score_hidden"])
class TestRefusal:
    def problem(self, kernel):
        return tune.problem(kernel, TINY_SHAPES[kernel], CPU, tune._TINY)

    def test_what_selects_the_same_is_allowed(self, kernel):
        given = self.problem(kernel)
        for config in tune.candidates(kernel, "half", quick=True)[:2]:
            assert tune.refusal(kernel, config, given, CPU) is None

    @pytest.mark.parametrize(
        ("spoil", "why"),
        [
            (lambda mask, indices, scores: (mask, indices, scores * 1.001), "scores are off by"),
            (lambda mask, indices, scores: (mask, indices, scores * torch.inf), "scores are finite where"),
            (lambda mask, indices, scores: (mask.roll(1), indices, scores), "mask or indices are not those"),
            (lambda mask, indices, scores: (mask, indices.flip(1), scores), "mask or indices are not those"),
        ],
    )
    def test_another_result_is_not(self, kernel, spoil, why):
        given = self.problem(kernel)

        def run(config):
            selection = given.run(config)
            return type(selection)(*spoil(*selection))

        config = tune.candidates(kernel, "half", quick=True)[0]
        assert why in tune.refusal(kernel, config, tune.Problem(run, given.check), CPU)

    def test_nor_is_what_does_not_compile(self, kernel):
        def run(config):
            raise RuntimeError("out of resource: shared memory,\n required 300000")

        why = tune.refusal(kernel, tune.candidates(kernel, "half")[0], tune.Problem(run, lambda selection: None), CPU)
        assert why == "does not run: RuntimeError: out of resource: shared memory, required 300000"

    @pytest.mark.parametrize(("spills", "why"), [(0, None), (None, None), (24, "spills 24 bytes")])
    def test_nor_is_what_spills(self, kernel, spills, why, monkeypatch):
        given = self.problem(kernel)
        module, name = {
            "score_and_select": (score_and_select, "_score_and_select_kernel"),
            "score_hidden": (score_hidden, "_score_hidden_kernel"),
        }[kernel]
        jitted = getattr(module, name)

        class Compiled:
            def __getitem__(self, grid):
                def run(*arguments, **constants):
                    jitted[grid](*arguments, **constants)
                    return SimpleNamespace(n_spills=spills)

                return run

        stand_in = Compiled()
        monkeypatch.setattr(module, name, stand_in)
        assert tune.refusal(kernel, tune.candidates(kernel, "half", quick=True)[0], given, CPU) == why
        assert getattr(module, name) is stand_in

    def test_a_shape_that_does_not_fit_is_no_fault_of_the_candidate(self, kernel):
        def run(config):
            raise torch.OutOfMemoryError("out of memory")

        given = tune.Problem(run, lambda selection: None)
        with pytest.raises(torch.OutOfMemoryError):
            tune.refusal(kernel, tune.candidates(kernel, "half")[0], given, CPU)


def test_times_are_those_after_a_flush_without_the_flush(monkeypatch):
    calls = []

    def do_bench_cudagraph(run, quantiles=None, return_mode="mean"):
        """Milliseconds: a call takes what it appends."""
        calls.clear()
        run()
        took = sum(calls)
        assert return_mode == ("mean" if quantiles else "median")
        return [took + quantile / 1000 for quantile in quantiles] if quantiles else took

    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", do_bench_cudagraph)
    times = tune.microseconds(lambda: calls.append(0.005), lambda: calls.append(0.1))
    assert calls == [0.1, 0.005]
    assert times == pytest.approx({"median": 5.5, "p20": 5.2, "p80": 5.8})


class TestWholeRun:
    """`tune` on a GPU that is not there: `measure` is replaced, the rest is the real thing."""

    @pytest.fixture(autouse=True)
    def pretended(self, monkeypatch):
        properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=2**37)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a test")
        self.properties = properties
        self.measured = []
        self.stop_after = None
        monkeypatch.setattr(tune, "measure", self.measure)

    def measure(self, kernel, shape, device, tried):
        if len(self.measured) == self.stop_after:
            raise KeyboardInterrupt
        self.measured.append((kernel, shape))
        microseconds = {"median": 5.0, "p20": 4.5, "p80": 6.0}
        return {"config": tried[-1], "microseconds": microseconds, "in_use": None, "refused": []}

    def run(self, out, fresh=False, kernels=("score_and_select", "score_hidden")):
        lines = []
        return tune.tune(kernels, out, True, fresh, lines.append), lines

    def test_writes_a_table_that_is_used_where_it_is_named(self, tmp_path, monkeypatch):
        out = tmp_path / "new" / "sm_90.json"
        table, lines = self.run(out)
        assert json.loads(out.read_text()) == table
        assert table["source"].startswith("measured by python -m hawk_kernels.tune")
        assert table["device"] == "a test"
        assert lines[0].startswith("[1/6] score_and_select dtype=half head_dim=128 rows=4 tokens=1280: 5.0 us")
        monkeypatch.setenv(configs.TABLE_VARIABLE, str(out))
        configs._own_table.cache_clear()
        try:
            found = configs.config_for("sm_90", "score_and_select", Shape("half", 128, 4, 1280), 132)
        finally:
            configs._own_table.cache_clear()
        expected = tune.candidates("score_and_select", "half", quick=True)[-1]
        assert found.num_programs == expected[tune.PER_MULTIPROCESSOR] * 132
        assert found.block_keys == expected["block_keys"]

    def test_what_is_in_use_is_tried_first(self, tmp_path, monkeypatch):
        first = []
        monkeypatch.setattr(
            tune,
            "measure",
            lambda kernel, shape, device, tried: first.append(tried[0]) or {"refused": [{"why": "a test"}]},
        )
        table, lines = self.run(tmp_path / "t.json", kernels=["score_and_select"])
        assert first == [
            tune.in_use("score_and_select", shape, "sm_90") for shape in tune.shapes("score_and_select", True)
        ]
        assert table["score_and_select"] == []
        assert "no candidate may be used, 1 refused: a test" in lines[0]

    def test_goes_on_where_it_was_killed(self, tmp_path):
        out = tmp_path / "t.json"
        self.stop_after = 2
        with pytest.raises(KeyboardInterrupt):
            self.run(out)
        assert not out.exists()
        assert len(json.loads(out.with_suffix(".partial.json").read_text())["score_and_select"]) == 2
        self.stop_after = 4
        with pytest.raises(KeyboardInterrupt):
            self.run(out)
        self.stop_after = None
        table, lines = self.run(out)
        assert len(self.measured) == len(set(self.measured)) == 6
        assert [line.endswith("measured before") for line in lines] == [True] * 4 + [False] * 2
        assert len(table["score_and_select"]) == len(table["score_hidden"]) == 3
        assert list(tmp_path.iterdir()) == [out]

    @pytest.mark.parametrize("change", ["fresh", "other code"])
    def test_forgets_what_does_not_count(self, tmp_path, monkeypatch, change):
        self.stop_after = 2
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path / "t.json")
        self.stop_after = None
        if change == "other code":
            monkeypatch.setattr(tune, "_digest", lambda: "other")
        self.run(tmp_path / "t.json", fresh=change == "fresh")
        assert len(self.measured) == 2 + 6

    def test_leaves_out_what_does_not_fit(self, tmp_path, monkeypatch):
        self.properties.total_memory = 2**29
        table, lines = self.run(tmp_path / "t.json")
        assert "left out, does not fit this GPU's memory" in lines[2]
        assert [entry["shape"]["tokens"] for entry in table["score_and_select"]] == [1280, 16384]

        def out_of_memory(*arguments):
            raise torch.OutOfMemoryError

        monkeypatch.setattr(tune, "measure", out_of_memory)
        table, lines = self.run(tmp_path / "u.json")
        assert table["score_and_select"] == table["score_hidden"] == []
        assert all("left out" in line for line in lines)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measures_a_shape(device):
    device = torch.device("cuda", torch.cuda.current_device())
    tried = tune.candidates("score_and_select", "half", quick=True)
    line = tune.measure("score_and_select", Shape("half", 128, 4, 1280), device, tried)
    assert line["config"] in tried
    assert 0 < line["microseconds"]["median"] < 1000
