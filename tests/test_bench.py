"""The benchmarks time nothing that is wrong and lose nothing that is finished; `make gpu` runs from end to end."""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tarfile
import time

import pytest
import torch

import hawk_kernels
from bench import (
    cases,
    cli,
    contenders,
    cpu_floor,
    environment,
    goals,
    gpu,
    inputs,
    model,
    parity,
    plots,
    report,
    score_and_select,
    test_operators,
    timing,
)
from hawk_kernels import Selection, select_topk

CPU = torch.device("cpu")
QUERIES = cases.Case("queries", cases.Decoder("tiny", 4, 2, 16, 64), 5, 48, "fp32")


@pytest.fixture
def scores():
    return torch.randn(2, 50, dtype=torch.float64)


class TestParity:
    def test_the_best_tokens_pass_in_any_order(self, scores):
        found = parity.check_kept(scores.topk(10, dim=1).indices.flip(1), scores, 0.0)
        assert found == parity.Parity(0.0, 0)

    def test_a_token_kept_in_place_of_a_better_one_fails(self, scores):
        order = scores.argsort(dim=1, descending=True)
        wrong = torch.cat([order[:, :9], order[:, 20:21]], dim=1)
        with pytest.raises(parity.ParityError, match="below the one left out"):
            parity.check_kept(wrong, scores, 1e-3)
        assert parity.check_kept(wrong, scores, 10.0).differing == 2

    @pytest.mark.parametrize("bad", [3, 50, -1])
    def test_an_index_twice_or_out_of_range_fails(self, scores, bad):
        indices = torch.tensor([[3, bad], [0, 1]])
        with pytest.raises(parity.ParityError, match="different ones below 50"):
            parity.check_kept(indices, scores, 100.0)

    def test_a_token_that_is_no_candidate_fails(self, scores):
        scores[:, :45] = -torch.inf
        with pytest.raises(parity.ParityError):
            parity.check_kept(torch.tensor([[44, 45], [45, 46]]), scores, 1e6)

    def test_a_nan_fails(self, scores):
        with pytest.raises(parity.ParityError):
            parity.check_kept(scores.topk(10, dim=1).indices, scores * torch.nan, 1e6)

    def test_a_selection_must_be_the_sort_of_its_own_scores(self, scores):
        good = select_topk(scores, 0.2)
        assert parity.check_selection(good, scores, 0.2) < 1e-6
        with pytest.raises(parity.ParityError, match="stable sort"):
            parity.check_selection(Selection(good.mask.roll(1, 1), good.indices, good.scores), scores, 0.2)
        with pytest.raises(parity.ParityError, match="off by"):
            parity.check_selection(Selection(good.mask, good.indices, good.scores * 1.001), scores, 0.2)
        with pytest.raises(parity.ParityError, match="finite"):
            parity.check_selection(Selection(good.mask, good.indices, good.scores.fill_(torch.inf)), scores, 0.2)


class TestContenders:
    @pytest.mark.parametrize("normalize", [None, "l2", "softmax", "minmax"])
    @pytest.mark.parametrize("kind", ["queries", "hidden"])
    def test_all_keep_what_float64_keeps(self, kind, normalize):
        case = cases.Case(kind, QUERIES.decoder, 5, 48, "fp32", batch=2, normalize=normalize)
        given = inputs.make_inputs(case, CPU)
        expected = given.expected(case)
        names = []
        for contender in contenders.contenders(case, given):
            assert contender.check(expected).error <= contender.tolerance
            names.append(contender.name)
        assert {contenders.RELEASED, contenders.STRONG} < set(names)

    def test_selections_alone_agree_exactly(self):
        case = cases.Case("scores", QUERIES.decoder, 1, 300, "fp32", batch=3)
        given = inputs.make_inputs(case, CPU)
        for contender in contenders.contenders(case, given):
            assert contender.check(given.expected(case)).differing == 0

    def test_one_that_fails_or_raises_is_reported_and_not_timed(self, monkeypatch):
        def run():
            raise RuntimeError("no such kernel")

        def two(case, given):
            wrong = torch.arange(9)[None]
            return [
                contenders.Contender("wrong", lambda: wrong, 1e-6),
                contenders.Contender("broken", run, 1e-6),
                *contenders_of(case, given),
            ]

        contenders_of = contenders.contenders
        monkeypatch.setattr(score_and_select, "contenders", two)
        row = score_and_select.measure(QUERIES, CPU, 1e10, None, rounds=5)
        entries = {entry["name"]: entry for entry in row["contenders"]}
        assert "ParityError" in entries["wrong"]["failed"]
        assert entries["broken"]["failed"] == "RuntimeError: no such kernel"
        assert "eager" not in entries["wrong"]
        assert entries[contenders.OURS]["eager"]["warm"]["samples"] == 5
        assert "not timed: RuntimeError: no such kernel" in "\n".join(report._case_table(row))

    def test_ours_failing_fails_the_run(self):
        row = {"title": "a case", "contenders": [{"name": "ours", "failed": "ParityError: off"}]}
        assert score_and_select.failures({"rows": [row]}) == ["a case: ParityError: off"]

    def test_parity_alone_times_nothing(self):
        results = score_and_select.run_checks(CPU, (QUERIES,))
        (row,) = results["rows"]
        assert {entry["name"] for entry in row["contenders"]} >= {contenders.OURS, contenders.RELEASED}
        assert not any("eager" in entry or "failed" in entry for entry in row["contenders"])


class TestResults:
    def test_a_killed_run_keeps_what_was_finished(self, monkeypatch, tmp_path):
        def measure(case, *_):
            if case.kind == "hidden":
                raise KeyboardInterrupt
            return {"title": str(case), "case": case.to_dict(), "contenders": [], "floor": {"microseconds": 1.0}}

        monkeypatch.setattr(score_and_select, "measure", measure)
        monkeypatch.setattr(score_and_select, "copy_bandwidth", lambda device: 1e10)
        with pytest.raises(KeyboardInterrupt):
            score_and_select.run(CPU, cases.TINY, tmp_path / "score_and_select.json")
        rows = json.loads((tmp_path / "score_and_select.json").read_text())["rows"]
        assert [row["case"]["kind"] for row in rows] == ["queries"]

    def test_cases_that_do_not_fit_the_time_are_named(self, monkeypatch, tmp_path):
        monkeypatch.setattr(score_and_select, "copy_bandwidth", lambda device: 1e10)
        results = score_and_select.run(CPU, cases.TINY, tmp_path / "score_and_select.json", seconds=-1.0)
        assert results["left_out"] == [str(case) for case in cases.TINY]

    def test_a_file_is_replaced_in_one_step(self, tmp_path):
        environment.write_json(tmp_path / "a.json", {"a": 1})
        with pytest.raises(TypeError):
            environment.write_json(tmp_path / "a.json", {"a": object()})
        assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]

    def test_every_number_says_where_it_comes_from(self):
        about = environment.environment(CPU)
        assert {"device", "date", "torch", "triton", "commit", "source", "python"} <= set(about)
        assert environment.results_folder(CPU).name.startswith("cpu-")

    def test_the_shapes_that_were_asked_for_are_there(self):
        measured = {(case.decoder.name, case.num_keys) for case in cases.GPU if case.kind == "queries"}
        assert {size for name, size in measured if name == "Qwen2.5-VL-7B"} >= set(cases.NUM_KEYS)
        assert {name for name, _ in measured} == {decoder.name for decoder in cases.DECODERS}
        assert {case.num_queries for case in cases.GPU if case.kind == "queries"} == set(cases.NUM_QUERIES)
        assert len(set(cases.GPU)) == len(cases.GPU)


class TestTiming:
    def test_every_contender_runs_once_a_round(self):
        order = []
        samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "ab"}
        samples = timing.rotate(samplers, rounds=7)
        assert {name: len(values) for name, values in samples.items()} == {"a": 7, "b": 7}
        assert order == ["a", "b"] * (len(order) // 2)

    def test_fewer_rounds_where_time_is_short_but_never_fewer_than_five(self):
        samples = timing.rotate({"slow": lambda: time.sleep(0.01) or 1.0}, rounds=50, seconds=0.02)
        assert len(samples["slow"]) == 5

    def test_spread(self):
        assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0, "samples": 6}
        assert timing.spread([4.0]) == {"median": 4.0, "p20": 4.0, "p80": 4.0, "samples": 1}

    def test_peak_memory_counts_what_is_held_at_once(self):
        x = torch.zeros(100, 1000)
        peak = timing.peak_bytes(lambda: (x + 1) * 2, CPU)
        assert 800_000 <= peak < 802_000

    def test_the_flush_is_subtracted_from_cold_replays(self, monkeypatch):
        """A clock that a call moves by 5 us, a flush by 30, and starting a graph not at all."""
        clock = {"now": 0.0}

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock["now"]

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        class Graph:
            def replay(self):
                clock["now"] += self.microseconds

        class Capture:
            def __init__(self, graph):
                self.graph = graph

            def __enter__(self):
                self.begin = clock["now"]

            def __exit__(self, *_):
                self.graph.microseconds = clock["now"] - self.begin

        class Flush:
            def __call__(self):
                clock["now"] += 30.0

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

        def run():
            clock["now"] += 5.0
            return torch.arange(48).topk(9).indices[None]

        monkeypatch.setattr(score_and_select, "contenders", lambda *_: [contenders.Contender("ours", run, 1e6)])
        row = score_and_select.measure(QUERIES, CPU, 1e10, Flush(), rounds=6)
        graph = row["contenders"][0]["graph"]
        assert graph["warm"]["median"] == pytest.approx(5.0)
        assert graph["cold"]["median"] == pytest.approx(5.0)

    def test_what_cannot_be_captured_says_so_and_is_timed_eagerly(self, monkeypatch):
        class Uncapturable:
            def __init__(self, run, calls, flush=None):
                if run is not None:
                    raise RuntimeError("operation not permitted when stream is capturing\nmore")

            def __call__(self):
                return 1.0

        monkeypatch.setattr(score_and_select, "Replay", Uncapturable)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        row = score_and_select.measure(QUERIES, CPU, 1e10, lambda: None, rounds=5)
        for entry in row["contenders"]:
            assert entry["no_graph"] == "RuntimeError: operation not permitted when stream is capturing"
            assert set(entry["eager"]) == {"warm", "cold"}


class TestModel:
    def test_keys_of_qwen_take_1024_bytes_each(self):
        case = cases.Case("queries", cases.QWEN_7B, 64, 131072, "bf16")
        queries = 28 * 64 * 128 * 2
        assert model.ours(case).read == 1024 * 131072 + queries
        given = model.Machine("measured", 4.3e12, 790e12, 50e12, 50e6)
        assert model.Cost(1024 * 131072, 0, 0, 0).floor(given, "bf16") == pytest.approx(31, abs=0.5)

    @pytest.mark.parametrize("case", [case for case in cases.GPU if case.kind != "scores"], ids=str)
    def test_the_released_steps_never_move_or_do_less(self, case):
        ours, released = model.ours(case), model.released(case)
        assert released.read + released.workspace > ours.read + ours.workspace
        assert released.flops > ours.flops

    def test_a_prefill_is_two_operations_a_weight_and_token_and_its_attention(self):
        config = type("Config", (), {})()
        vars(config).update(
            hidden_size=3584,
            num_attention_heads=28,
            num_key_value_heads=4,
            num_hidden_layers=28,
            intermediate_size=18944,
            vocab_size=152064,
        )
        weights = 28 * (3584 * 128 * (28 + 28 + 4 + 4) + 3 * 3584 * 18944)
        linear = 2 * weights * 1000 + 2 * 3584 * 152064
        attention = 28 * 2 * 2 * 28 * 128 * 1000 * 1001 / 2
        assert model.prefill_flops(config, 1000) == linear + attention


def _micro_rows(ours, released, strong, kind="queries", num_keys=1296, graph=True):
    def entry(name, median):
        ways = {"cold": {"median": median}, "warm": {"median": median}}
        return {"name": name, "eager": ways, **({"graph": ways} if graph else {})}

    case = cases.Case(kind, cases.QWEN_7B, 64, num_keys, "bf16").to_dict()
    entries = [entry("ours", ours), entry("released steps", released), entry("strong PyTorch", strong)]
    return {"case": case, "title": "t", "contenders": entries, "floor": {"microseconds": 2.0, "bytes": 10}}


class TestGoals:
    def test_a_goal_is_reached_by_the_worst_of_its_values(self):
        rows = [_micro_rows(8.0, 400.0, 50.0), _micro_rows(10.0, 160.0, 20.0, num_keys=16384)]
        lines = goals.table(rows, []).splitlines()
        assert lines[2].endswith("| 8 us (M=1296) | bar |")
        assert lines[3].endswith("| 10 us (M=16384) | goal |")
        assert lines[5].endswith("| 50 x (M=1296), 16 x (M=16384) | bar |")
        assert lines[6].endswith("| 6.25 x (M=1296), 2 x (M=16384) | not reached |")

    def test_cells_stay_empty_without_a_gpu(self):
        lines = goals.table([_micro_rows(8.0, 400.0, 50.0, graph=False)], []).splitlines()[2:]
        assert all(line.endswith("|  |  |") for line in lines)

    def test_the_prefill_is_taken_at_5120_tokens_and_80_percent(self):
        rows = [
            {
                "way": way,
                "pruned": pruned,
                "visual_tokens": m,
                "pruning_share": {"median": 0.005},
                "speed_up_of_limit": 0.9,
            }
            for way, pruned, m in (
                ("ours", 0.8, 5120),
                ("ours", 0.6, 5120),
                ("released", 0.8, 5120),
                ("ours", 0.8, 1296),
            )
        ]
        lines = goals.table([], rows).splitlines()
        assert lines[-2].endswith("| 0.5 % (M=5120) | bar |")
        assert lines[-1].endswith("| 90 % (M=5120) | bar |")


class TestPictures:
    def test_growth_has_a_point_for_each_size_and_needs_two(self, tmp_path):
        pytest.importorskip("matplotlib")
        about = {"device": "a GPU"}
        rows = [_micro_rows(8.0 * m, 400.0 * m, 50.0 * m, num_keys=m) for m in (256, 1296, 5120)]
        for row in rows:
            for entry in row["contenders"]:
                for way in (*entry["eager"].values(), *entry["graph"].values()):
                    way |= {"p20": way["median"] * 0.9, "p80": way["median"] * 1.1}
        title, lines = plots.series(rows)
        assert "graph" in title
        assert [point[0] for point in lines["ours"]] == [256, 1296, 5120]
        assert plots.draw_growth({"rows": rows, "environment": about}, "queries", tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 10_000
        assert not plots.draw_growth({"rows": rows[:1], "environment": about}, "queries", tmp_path / "b.png")

    def test_without_matplotlib_the_way_out_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setattr(plots, "available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["plots", str(tmp_path)])
        with pytest.raises(SystemExit, match="pip install matplotlib"):
            plots.main()


class TestPrefill:
    def test_the_release_and_ours_keep_the_same_tokens_and_say_the_same(self):
        from bench import prefill
        from bench.released import released_pruning
        from hawk_kernels import prune

        tiny = prefill.make_model(prefill.SHAPES["tiny"], CPU, torch.float32)
        prompt = prefill.make_prompt(tiny, 36)
        visual = (prompt["input_ids"][0] == prefill._IMAGE).nonzero().squeeze(1)
        queries = torch.arange(64) + int(visual[-1]) + 2
        with torch.no_grad():
            with prune(tiny, keep_ratio=0.25, head_weights="uniform") as pruning:
                ours = tiny(**prompt, logits_to_keep=1)
            assert torch.equal(pruning.query_mask[0].nonzero().squeeze(1), queries)
            with released_pruning(tiny, 0.25, torch.full((4,), 0.25), queries, visual):
                theirs = tiny(**prompt, logits_to_keep=1)
        assert ours.past_key_values.get_seq_length() == prompt["input_ids"].shape[1] - 27
        assert prefill.cache_bytes(ours.past_key_values) == prefill.cache_bytes(theirs.past_key_values)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
        assert not tiny.model.language_model._forward_pre_hooks

    def test_the_watch_sees_our_hooks_and_nothing_else(self):
        from bench import prefill

        tiny = prefill.make_model(prefill.SHAPES["tiny"], CPU, torch.float32)
        prompt = prefill.make_prompt(tiny, 36)
        watch = prefill.Watch(tiny, CPU)

        def slow(*_):
            time.sleep(0.05)

        with watch.outside():
            handles = [
                tiny.model.language_model.register_forward_pre_hook(slow),
                tiny.model.register_forward_hook(slow),
            ]
            with watch.inside():
                prefill.first_token(tiny, prompt)
        for handle in handles:
            handle.remove()
        parts = watch.microseconds()
        assert set(parts) == {f"{way} {level}" for way in ("in", "out") for level in ("head", "multimodal", "text")}
        assert parts["in text"] >= 50_000
        assert parts["out multimodal"] >= 50_000
        assert sum(parts.values()) < 200_000
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())


def _stage(name, code, seconds=30.0, **options):
    return gpu.Stage(name, ((sys.executable, "-c", code),), seconds, **options)


@pytest.mark.parametrize(
    ("num_keys", "dtype", "required"), [(64, "fp32", 1.0), (5120, "fp32", 1.2), (5120, "bf16", 0.8)]
)
def test_the_cpu_floor_says_what_is_required_of_a_row(num_keys, dtype, required):
    row = cpu_floor.measure(cases.Case("queries", QUERIES.decoder, 3, num_keys, dtype), 1)
    assert row["required"] == required
    assert row["met"] == {kind: ratio >= required for kind, ratio in row["speedup"].items()}
    verdict = "met" if row["met"]["medians"] else "NOT MET"
    assert f"required {required}x: {verdict} (" in cpu_floor._line(row)


COMMANDS = [
    *("__main__", "attention_column_mean", "compact", "cpu_floor", "decode_overhead", "encoder_cost", "few_kernels"),
    *("gpu", "greedy", "host_cost", "hub", "in_stack"),
    *("model", "plots", "prefill", "report", "score_and_select", "score_peaks", "support_table", "verify"),
    *("tinyvqa.alignment", "tinyvqa.evaluate", "tinyvqa.samples", "tinyvqa.table", "tinyvqa.train"),
    "vllm_gpu",
]


class TestCommandLine:
    def test_all_commands_share_one_parser(self, repository):
        own = {"bench/cli.py", "bench/compile_only.py"}
        for path in (repository / "bench").rglob("*.py"):
            name = path.relative_to(repository).as_posix()
            source = path.read_text()
            assert "ArgumentParser(" not in source or name in own
            is_command = "cli.parser(" in source and name not in own
            stem = name.removeprefix("bench/").removesuffix(".py").replace("/", ".")
            assert is_command == (stem in COMMANDS), name

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_is_the_docstring(self, name, monkeypatch, capsys):
        module = importlib.import_module(f"bench.{name}")
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as stopped:
            module.main()
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: python -m bench{f'.{name}' if name != '__main__' else ''} ")
        assert module.__doc__.strip() in text

    def test_common_options(self):
        parser = cli.parser("bench.x", "What it does.", device=CPU, rounds=3, seconds=(None, "s"), json="a", output="b")
        given = parser.parse_args(["--rounds", "7", "--seconds=0.5", "--device", "meta"])
        assert (given.rounds, given.seconds, given.device) == (7, 0.5, torch.device("meta"))
        assert (given.json, given.output) == (None, None)
        assert cli.parser("bench.x", None).parse_args([]) == argparse.Namespace()

    def test_results_go_to_the_file_or_folder_that_was_given(self, tmp_path):
        parser = cli.parser("bench.x", None, device=CPU, json="a", output="b")
        assert cli.results_file(parser.parse_args([]), "x.json") == environment.results_folder(CPU) / "x.json"
        in_folder = parser.parse_args(["--output", str(tmp_path)])
        assert cli.results_file(in_folder, "x.json") == tmp_path / "x.json"
        in_file = parser.parse_args(["--json", str(tmp_path / "y.json")])
        assert cli.results_file(in_file, "x.json") == tmp_path / "y.json"

    @pytest.mark.parametrize(
        ("kind", "text", "says"),
        [
            (cli.whole_number(1), "0", "expected a whole number of at least 1, got '0'"),
            (cli.whole_number(1), "two", "expected a whole number of at least 1, got 'two'"),
            (cli.shard, "2/2", "expected I/N with 0 <= I < N, got '2/2'"),
            (cli.shard, "1", "expected I/N with 0 <= I < N, got '1'"),
            (cli.shard, "-1/2", "expected I/N"),
            (cli.output_folder, __file__, "expected a folder, got the file"),
            (cli.checkpoint_folder, "nowhere", "which has no config.json; python -m bench.tinyvqa.train --out FOLDER"),
        ],
    )
    def test_a_mistake_is_told_before_the_work_begins(self, kind, text, says):
        with pytest.raises(argparse.ArgumentTypeError) as error:
            kind(text)
        assert says in str(error.value)

    def test_shards_cover_everything_once(self):
        parts = [cli.shard(f"{i}/3") for i in range(3)]
        found = [number for position, count in parts for number in range(10)[position::count]]
        assert sorted(found) == list(range(10))


def test_the_hooks_and_the_lint_use_one_version_of_ruff(repository):
    hooks = (repository / ".pre-commit-config.yaml").read_text()
    pinned = (repository / "constraints.txt").read_text()
    (version,) = re.findall(r"^ruff==(\S+)$", pinned, re.M)
    assert f"rev: v{version}\n" in hooks


class TestOperators:
    def test_every_public_operator_is_timed(self):
        test_operators.test_every_public_operator_is_timed()

    @pytest.mark.parametrize("operator", test_operators.OPERATORS)
    def test_parity_comes_before_the_time(self, operator):
        assert test_operators.OPERATORS[operator](CPU)() is not None

    def test_a_wrong_operator_is_not_timed(self, monkeypatch):
        right = hawk_kernels.select_topk
        monkeypatch.setattr(hawk_kernels, "select_topk", lambda scores, r: right(-scores, r))
        with pytest.raises(parity.ParityError):
            test_operators.OPERATORS["select_topk"](CPU)


class TestGpuCommand:
    def test_without_a_gpu_it_says_so_and_fails(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert gpu.main([]) == 2
        assert "no CUDA device" in capsys.readouterr().err

    def test_a_failing_or_hanging_stage_does_not_cost_the_others(self, tmp_path, capsys):
        hang = "import subprocess, sys, time; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
        todo = [
            [_stage("broken", "print('why it broke'); raise SystemExit(3)")],
            [_stage("hanging", hang, 1.0), _stage("beside", "print('fine')")],
            [_stage("last", f"open({str(tmp_path / 'written')!r}, 'w')")],
        ]
        start = time.perf_counter()
        assert gpu.run(todo, tmp_path, 100.0, None, environment.environment(CPU)) == 1
        assert time.perf_counter() - start < 30
        stages = {entry["name"]: entry["status"] for entry in json.loads((tmp_path / "gpu.json").read_text())["stages"]}
        assert stages == {"broken": "failed", "hanging": "out of time", "beside": "passed", "last": "passed"}
        assert (tmp_path / "written").exists()
        assert "why it broke" in capsys.readouterr().out

    @pytest.mark.parametrize(("correctness", "code"), [(True, 1), (False, 0)])
    def test_correctness_that_was_not_established_is_a_failure(self, tmp_path, correctness, code):
        todo = [[_stage("slow", "import time; time.sleep(60)", 0.5, correctness=correctness)]]
        assert gpu.run(todo, tmp_path, 100.0, None, environment.environment(CPU)) == code

    def test_what_the_budget_has_no_time_for_is_left_out(self, tmp_path):
        todo = [[_stage("first", "pass")], [_stage("second", "pass")]]
        assert gpu.run(todo, tmp_path, 0.0, None, environment.environment(CPU)) == 0
        stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
        assert [entry["status"] for entry in stages] == ["left out", "left out"]

    def test_every_command_for_a_gpu_is_one_that_its_module_understands(self, monkeypatch, tmp_path):
        class UnderstoodError(Exception):
            pass

        parse = argparse.ArgumentParser.parse_args

        def only_parse(parser, arguments=None):
            parse(parser, arguments)
            raise UnderstoodError

        monkeypatch.setattr(gpu, "parity_processes", lambda: 2)
        monkeypatch.setattr(gpu, "sanitizer", lambda: "/usr/local/cuda/bin/compute-sanitizer")
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        todo = [stage for group in gpu.stages(tmp_path, tune=False) for stage in group]
        assert len({stage.name for stage in todo}) == len(todo)
        for stage in todo:
            for command in stage.commands:
                module, *options = command[command.index("-m") + 1 :]
                if module != "pytest":
                    monkeypatch.setattr(sys, "argv", [module, *options])
                    with pytest.raises(UnderstoodError):
                        importlib.import_module(module).main()

    def test_a_dry_run_goes_from_end_to_end(self, tmp_path):
        """Without the stages that are other modules' and pytest itself."""
        archive = tmp_path / "results.tar.gz"
        command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--output", str(tmp_path / "out")]
        command += ["--archive", str(archive), "--only", "parity", "verify", "score_and_select", "prefill", "host_cost"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=environment.REPOSITORY)
        assert result.returncode == 0, result.stdout + result.stderr
        stages = json.loads((tmp_path / "out" / "gpu.json").read_text())["stages"]
        assert [entry["status"] for entry in stages] == ["passed"] * 5
        text = (tmp_path / "out" / "RESULTS.md").read_text()
        for section in ("## Correctness", "## To the kept tokens", "## Host cost", "## Whole prefill"):
            assert section in text
        # times of a CPU say nothing about what is asked of a GPU
        assert "Bars and goals" not in text
        with tarfile.open(archive) as packed:
            assert "out/score_and_select.json" in packed.getnames()
