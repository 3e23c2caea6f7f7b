"""`hawk-kernels calibrate` and `hawk-kernels weights`: the shipped model, questions in a file, text, JSON, pictures."""

import builtins
import json
import sys

import pytest
import torch
from PIL import Image

from hawk_kernels.__main__ import main
from hawk_kernels.checkpoint import TINY_MODEL
from hawk_kernels.head_weights import shipped_weights


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Six questions about a shipped picture, with their right answers."""
    path = tmp_path_factory.mktemp("data") / "digits.jsonl"
    samples = TINY_MODEL / "samples"
    things = json.loads((samples / "samples.json").read_text())["digits_8x8.png"]["objects"][:6]
    lines = [
        {
            "image": str(samples / "digits_8x8.png"),
            "prompt": f"Which digit is {thing['colour']}?",
            "answer": str(thing["digit"]),
        }
        for thing in things
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def weights(questions, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "weights.json"
    command = ["calibrate", "--model", str(TINY_MODEL), "--data", str(questions), "--out", str(out)]
    assert main([*command, "--layers", "both", "--limit", "4", "--device", "cpu"]) == 0
    return out


def run(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_calibrate_writes_a_file_that_prune_reads(weights):
    from hawk_kernels import prune
    from hawk_kernels.checkpoint import load_checkpoint

    content = json.loads(weights.read_text())
    assert len(content["weights"]) == content["fingerprint"]["num_attention_heads"]
    assert sum(content["weights"]) == pytest.approx(1)
    assert (content["layers"], list(content["other_layers"])) == ("first", ["all"])
    assert content["tasks"][0]["name"] == "digits"
    assert (content["tasks"][0]["samples"], content["tasks"][0]["total"]) == (4, 6)
    assert content["settings"]["limit"] == 4
    model, _ = load_checkpoint(str(TINY_MODEL), "float32", torch.device("cpu"))
    assert "weights.json" in repr(prune(model, 0.5, head_weights=weights))


def test_calibrate_tells_what_it_found_and_goes_on_from_its_journal(weights, questions, capsys, monkeypatch):
    from hawk_kernels.calibration import run as module

    def never(*args, **kwargs):
        raise AssertionError("asked again")

    monkeypatch.setattr(module, "answers_with_masked_heads", never)
    command = ["calibrate", "--model", TINY_MODEL, "--data", questions, "--out", weights, "--layers", "both"]
    status, out, _ = run(capsys, *command, "--limit", "4", "--device", "cpu")
    assert status == 0
    assert "digits: score " in out
    assert f"wrote {weights}" in out
    assert "head  weight" in out
    status, out, _ = run(capsys, *command, "--limit", "4", "--device", "cpu", "--json")
    report = json.loads(out)
    assert report["out"] == str(weights)
    assert report["weights"] == json.loads(weights.read_text())["weights"]


def test_a_dry_run_checks_the_data_and_loads_no_model(questions, tmp_path, capsys):
    command = ["calibrate", "--model", "/nowhere", "--dry-run", "--data"]
    assert run(capsys, *command, questions)[1] == "digits: 6 of 6 samples\nthe data is in order\n"
    status, out, _ = run(capsys, *command, questions, "--limit", "5", "--json")
    assert json.loads(out) == {"dry_run": True, "tasks": [{"name": "digits", "samples": 5, "total": 6}]}
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"image": "gone.png", "question": "?", "answer": "x"}\nnot json\n')
    status, out, err = run(capsys, *command, bad)
    assert status == 1
    assert "bad.jsonl:1: there is no file" in err
    assert "bad.jsonl:2: Expecting value" in err


def test_tasks_of_a_module_in_this_folder(questions, tmp_path, capsys, monkeypatch):
    (tmp_path / "helper_of_mine.py").write_text(f"PATH = {str(questions)!r}\n")
    (tmp_path / "tasks_of_mine.py").write_text(
        "from hawk_kernels.calibration import JsonlTask\n"
        "def digits():\n"
        "    from helper_of_mine import PATH\n"
        "    return JsonlTask(PATH, name='mine')\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    command = ["calibrate", "--model", "/nowhere", "--dry-run", "--data", "tasks_of_mine:digits"]
    assert run(capsys, *command)[1] == "mine: 6 of 6 samples\nthe data is in order\n"
    assert sys.path == before


def test_a_module_of_tasks_that_fails_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_tasks.py").write_text("def tasks(:")
    (tmp_path / "failing_tasks.py").write_text("def tasks(): return {}['gone']")
    told = {
        "broken_tasks": "error: data: could not get broken_tasks:tasks: SyntaxError: ",
        "failing_tasks": "error: data: failing_tasks:tasks failed: KeyError: 'gone'; with --traceback",
    }
    for name, message in told.items():
        status, _, err = run(capsys, "calibrate", "--model", TINY_MODEL, "--data", f"{name}:tasks", "--dry-run")
        assert (status, err.count("\n")) == (1, 1)
        assert err.startswith(message)


def test_bad_data_is_told_before_the_model_is_loaded(tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("not json\n")
    status, _, err = run(capsys, "calibrate", "--model", "/nowhere", "--data", bad, "--out", tmp_path / "w.json")
    assert (status, "bad.jsonl:1" in err) == (1, True)
    assert not list(tmp_path.glob("w.json*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "{data}", "--model", "/nowhere"], "there is no folder /nowhere"),
        (["--data", "{data}", "--device", "tpux"], "--device tpux cannot be used here"),
        (["--data", "{data}", "--device", "meta"], "--device meta cannot be used here"),
        (["--data", "{data}", "--out", "/nowhere/weights.json"], "--out: expected a file in a folder that exists"),
        (["--data", "{data}", "--out", ".", "--dry-run"], "out: expected a file to write, got the folder '.'"),
        (["--data", "chartqa"], "data: expected FILE.jsonl"),
    ],
)
def test_mistakes_on_the_command_line_are_told_in_one_line(words, message, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "calibrate", "--model", TINY_MODEL, *(w.format(data=questions) for w in words))
    assert status == 1
    assert err.splitlines()[-1].startswith(f"error: {message}")


def test_an_error_shows_where_it_comes_from_when_asked(capsys):
    with pytest.raises(ValueError, match="data: expected"):
        main(["calibrate", "--model", "x", "--data", "chartqa", "--traceback"])


def test_accelerate_with_one_process_says_how_to_get_more(questions, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    command = ["calibrate", "--model", TINY_MODEL, "--data", questions, "--out", weights, "--layers", "both"]
    status, _, err = run(capsys, *command, "--limit", "4", "--device", "cpu")
    assert status == 0
    assert "note: accelerate started one process; on CPUs it takes --multi_gpu to start more" in err


@pytest.mark.parametrize("command", ["calibrate", "weights"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: hawk-kernels {command}" in capsys.readouterr().out


def test_weights_show_draws_bars_and_drops(weights, tmp_path, capsys):
    picture = tmp_path / "weights.png"
    status, out, _ = run(capsys, "weights", "show", weights, "--out", picture)
    assert status == 0
    assert f"drew {picture}" in out
    assert "visual tokens masked in layers: first" in out
    with Image.open(picture) as drawn:
        colours = drawn.convert("RGB").getcolors(maxcolors=2**20)
        assert drawn.width > drawn.height > 400
        assert len(colours) > 20
    status, out, _ = run(capsys, "weights", "show", weights, "--no-picture", "--json")
    assert json.loads(out)["picture"] is None


def test_a_heavier_head_has_a_taller_bar_and_a_drop_its_colour(tmp_path):
    from hawk_kernels.calibration.plots import draw_weights
    from hawk_kernels.calibration.result import Calibration

    def drawn(weights, deltas):
        path = tmp_path / "drawn.png"
        task = {"name": "t", "samples": 1, "base": 1.0, "base_standard_error": None}
        content = {"weights": weights, "deltas": deltas, "tasks": [task]}
        draw_weights(Calibration.from_dict(content, "drawn"), path)
        with Image.open(path) as picture:
            return picture.convert("RGB")

    def count(picture, colour):
        return sum(n for n, found in picture.getcolors(maxcolors=2**20) if found == colour)

    bar = (0x2F, 0x6F, 0x9F)
    assert count(drawn([1.0, 0.0], [[0.5], [0.0]]), bar) < count(drawn([0.5, 0.5], [[0.5], [0.0]]), bar)
    deepest_red = (103, 0, 31)
    gained, lost = drawn([1.0, 0.0], [[0.0], [-0.5]]), drawn([1.0, 0.0], [[0.5], [0.0]])
    # the scale of colours beside the map shows a few pixels of every colour
    assert count(lost, deepest_red) > 10 * count(gained, deepest_red)


def test_weights_show_takes_a_shipped_name_and_a_file_with_weights_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, "weights", "show", "qwen2_5_vl_7b")
    assert status == 0
    assert (tmp_path / "qwen2_5_vl_7b.png").is_file()
    assert out.splitlines()[3].split() == ["1", "0.2378"]
    (tmp_path / "plain.json").write_text('{"weights": [0.25, 0.75]}')
    assert run(capsys, "weights", "show", "plain.json")[0] == 0
    status, _, err = run(capsys, "weights", "show", "gone.json")
    assert status == 1
    assert "expected a weights file or one of qwen2_5_vl_7b" in err


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": []},
        {"weights": ["a"] * 4},
        {"weights": [10**400] * 4},
        {"standard_errors": [0.1]},
        {"deltas": [[0.1, 0.2], [0.1]]},
        {"tasks": [{"name": "digits"}]},
        {"flat_tasks": "digits"},
        {"other_layers": {"all": {}}},
        {"model": None},
        {"fingerprint": "qwen"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_weights_show_names_the_field_that_is_broken(weights, changed, tmp_path, capsys):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps({**json.loads(weights.read_text()), **changed}))
    status, out, err = run(capsys, "weights", "show", path, "--out", tmp_path / "broken.png")
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {path}: expected '{next(iter(changed))}")
    assert not (tmp_path / "broken.png").exists()


def test_weights_show_takes_names_as_they_are_and_results_without_drops(weights, tmp_path, capsys):
    content = json.loads(weights.read_text())
    content["model"], content["tasks"][0]["name"] = "price$a$", "$\\bad$"
    content["deltas"] = content["flat_tasks"] = None
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    assert run(capsys, "weights", "show", path, "--out", tmp_path / "odd.png")[0] == 0
    status, _, err = run(capsys, "weights", "show", path, "--out", tmp_path)
    assert (status, "expected a picture to write, got the folder" in err) == (1, True)


def test_weights_list_names_what_is_shipped(capsys):
    assert "qwen2_5_vl_7b: Qwen/Qwen2.5-VL-7B-Instruct, 28 heads" in run(capsys, "weights", "list")[1]
    assert set(json.loads(run(capsys, "weights", "list", "--json")[1])) == set(shipped_weights())


def test_without_matplotlib_the_command_that_brings_it_is_told(weights, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    status, _, err = run(capsys, "weights", "show", weights)
    monkeypatch.undo()
    assert status == 1
    assert "drawing needs matplotlib, which is not installed: pip install matplotlib" in err
