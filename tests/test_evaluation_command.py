"""`hawk-kernels evaluate`: the shipped model, questions in a file, text, JSON, pictures, and mistakes in one line."""

import json
import os
import subprocess
import sys

import pytest

from hawk_kernels.__main__ import main
from hawk_kernels.checkpoint import TINY_MODEL


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Questions about two shipped pictures, with their right answers."""
    path, samples = tmp_path_factory.mktemp("data") / "digits.jsonl", TINY_MODEL / "samples"
    pictures = json.loads((samples / "samples.json").read_text())
    lines = [
        {"image": str(samples / name), "prompt": f"Which digit is {thing['colour']}?", "answer": str(thing["digit"])}
        for name in ("digits_8x8.png", "digits_6x6.png")
        for thing in pictures[name]["objects"][:2]
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture(scope="module")
def out(questions, tmp_path_factory):
    """A folder that a process of its own has written."""
    out = tmp_path_factory.mktemp("made") / "evaluation"
    words = ["--model", str(TINY_MODEL), "--data", str(questions), "--out", str(out), "--device", "cpu"]
    command = [sys.executable, "-m", "hawk_kernels", "evaluate", *words, "--methods", "hawk,random:seed=3", "divprune"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--keep", "1", "0.4", "8"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| random:seed=3 | 8 tokens | " in done.stdout
    assert f"wrote {out}" in done.stdout
    assert "warning: digits: 4 questions about 2 pictures are few" in done.stderr
    return out


def run(capsys, *words):
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_it_writes_whole_files_about_every_method_and_ratio(out):
    assert {path.name for path in out.iterdir()} == {
        "journal",
        "results.json",
        "results.md",
        "results.png",
        "report.html",
    }
    content = json.loads((out / "results.json").read_text())
    rows = [(result["method"], result["keep"]) for result in content["methods"]]
    assert rows == [(m, keep) for m in ("hawk", "random:seed=3", "divprune") for keep in (0.4, 8)]
    assert content["unpruned"]["visual_tokens"] == (64 + 36) / 2
    assert [result["visual_tokens"] for result in content["methods"][:2]] == [(25 + 14) / 2, 8]
    assert content["unpruned"]["score"] == 1.0
    assert content["tasks"][0] | {"digest": ""} == {
        "name": "digits",
        "samples": 4,
        "total": 4,
        "pictures": 2,
        "digest": "",
        "score": 1.0,
    }


def test_the_same_command_goes_on_from_its_journal(out, questions, capsys, monkeypatch):
    from hawk_kernels.evaluation import run as module

    def never(*args, **kwargs):
        raise AssertionError("asked again")

    monkeypatch.setattr(module, "timed_generation", never)
    command = ["evaluate", "--model", TINY_MODEL, "--data", questions, "--out", out, "--device", "cpu", "--json"]
    status, text, _ = run(capsys, *command, "--methods", "hawk", "divprune", "--keep", "0.4")
    assert status == 0
    report = json.loads(text)
    assert report["out"] == str(out)
    assert [result["method"] for result in report["methods"]] == ["hawk", "divprune"]
    assert json.loads((out / "results.json").read_text())["methods"] == report["methods"]


def test_a_dry_run_checks_data_and_methods_and_loads_no_model(questions, capsys):
    command = ["evaluate", "--model", "/nowhere", "--dry-run", "--data", questions]
    assert run(capsys, *command)[1] == "digits: 4 of 4 samples\nthe data is in order\n"
    status, text, _ = run(capsys, *command, "--limit", "3", "--json")
    assert status == 0
    assert json.loads(text) == {"dry_run": True, "tasks": [{"name": "digits", "samples": 3, "total": 4}]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "{data}", "--model", "/nowhere"], "there is no folder /nowhere"),
        (["--data", "{data}", "--methods", "tea"], "methods: tea: method: expected one of"),
        (["--data", "{data}", "--methods", "fastv:depth=1"], "methods: fastv:depth=1: method 'fastv' has no option"),
        (["--data", "{data}", "--methods", "fastv:layer=9"], "methods: fastv:layer=9: layer"),
        (["--data", "{data}", "--keep", "1"], "keep: expected a keep ratio below 1.0"),
        (["--data", "{data}", "--keep", "2:0.4"], "methods: hawk at 2:0.4: head_weights: expected those of layer 3"),
        (["--data", "{data}", "--methods", "cdpruner@9"], "methods: cdpruner@9: layer: expected 1 to 2"),
        (["--data", "{data}", "--out", "{data}"], "out: expected a folder, got the file"),
        (["--data", "{data}", "--head-weights", "gone.json"], "methods: hawk: head_weights"),
        (["--data", "chartqa"], "data: expected FILE.jsonl"),
    ],
)
def test_mistakes_on_the_command_line_are_told_in_one_line(words, message, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word.format(data=questions) for word in words]
    status, _, err = run(capsys, "evaluate", "--model", TINY_MODEL, "--device", "cpu", *words)
    assert status == 1
    assert err.splitlines()[-1].startswith(f"error: {message}")


def test_stages_stand_in_the_table_with_their_layers_and_cost(questions, tmp_path, capsys):
    methods = ["--methods", "cdpruner@2", "fastv-release", "hawk"]
    command = ["evaluate", "--model", TINY_MODEL, "--data", questions, "--out", tmp_path / "out", "--device", "cpu"]
    status, text, _ = run(capsys, *command, *methods, "--keep", "0.2", "--limit", "2")
    assert status == 0
    head, *rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    cells = {row[0]: dict(zip(head, row, strict=False)) for row in rows[1:5]}
    whole = float(cells["unpruned"]["visual tokens"])
    for label, layer in (("cdpruner@2", "2"), ("fastv-release", "2"), ("hawk", "0")):
        assert cells[label]["after layer"] == layer
        left = float(cells[label]["visual tokens"])
        expected = (2 * whole + left) / 3 if layer == "2" else left
        assert float(cells[label]["tokens per layer"]) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("keep", ["2:", "2:0.4:", "two:0.4", "2:2.5", "2:0.4,2:0.2"])
def test_misspelled_stages_are_told_with_what_was_expected(keep, questions, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--model", str(TINY_MODEL), "--data", str(questions), "--keep", keep])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("hawk-kernels evaluate: error: argument --keep: ")
    assert any(
        remedy in message
        for remedy in ("such as 2:0.4 or 0:0.5,2:fastv:0.2", "leave out one of the stages", "give a share above 0")
    )


def test_help_tells_how_methods_are_spelled(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "usage: hawk-kernels evaluate" in text
    assert "such as fastv:layer=2" in text
    assert "NAME@LAYER" in text
    assert "such as 0:0.5,2:0.2" in text


def test_the_tables_questions_get_the_answers_of_the_table(monkeypatch):
    """One question at a time by `generate`, as `hawk-kernels evaluate` asks, and all at once, as the table does."""
    pytest.importorskip("sklearn")
    from bench.tinyvqa import table, tasks
    from bench.tinyvqa.evaluate import draw_evaluation
    from bench.tinyvqa.qwen import QWEN
    from bench.tinyvqa.scenes import Layout
    from hawk_kernels.evaluation import Contender, evaluate

    monkeypatch.setattr(QWEN, "layouts", {Layout(4, 4): 0.5, Layout(3, 4, 2, "video"): 0.5})
    subject = table.Subject.load(TINY_MODEL)
    contender = table.Contender("HAWK, uniform", "hawk", {"normalize": None}, "uniform")
    (batches, found) = draw_evaluation(QWEN, 3, 2), tasks.table_tasks(QWEN, 2, 3)
    right = [table.answer(subject, batch, [("key", contender, 0.2)], {})["key"] for batch in batches]
    kinds = [question.kind for batch in batches for row in batch.questions for question in row]
    compared = Contender("hawk", "hawk", {"normalize": None, "head_weights": "uniform"})
    with pytest.warns(UserWarning, match="are few"):
        evaluation = evaluate(
            subject.model, found, methods=[compared], keep=[0.2], processor=subject.processor, progress=False
        )
    answers = [ok for part in right for ok in part]
    for kind in QWEN.kinds:
        of_kind = [ok for ok, name in zip(answers, kinds, strict=True) if name == kind]
        assert evaluation.of("hawk", 0.2).scores[kind] == pytest.approx(sum(of_kind) / len(of_kind))
    assert 0 < sum(answers) < len(answers)


def test_the_digits_that_are_evaluated_are_not_those_of_calibration():
    pytest.importorskip("sklearn")
    from bench.tinyvqa import tasks
    from hawk_kernels.tasks import load_tasks

    asked = []
    draw = tasks.draw_tasks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "QUESTIONS_A_KIND", 4)
        patch.setattr(tasks, "draw_tasks", lambda split, *rest: (asked.append(split), draw(split, *rest))[1])
        load_tasks(["tinyvqa"])
        load_tasks(["tinyvqa"], held_out=True)
    assert asked == ["train", "held_out"]
