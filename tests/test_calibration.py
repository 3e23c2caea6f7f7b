"""Calibration from start to end: what it measures, what it keeps when it is killed, and what several processes find."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import csrc_ref
from hawk_kernels import calibrate, prune
from hawk_kernels.calibration import BadSamplesError, Calibration, Sample
from hawk_kernels.calibration.masking import attention_modules, hide_visual_tokens
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.tasks.journal import Journal
from tests.calibration_job import NUM_HEADS, Reader, Riddles, tasks, tiny_model
from tests.tiny_models import Picture, question, qwen_batch


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def measured(model):
    return calibrate(model, tasks(), processor=Reader(), layers="both", progress=False)


def content_of(path):
    """A weights file without its date, which alone may differ."""
    content = json.loads(path.read_text())
    assert content.pop("date")
    return content


def finished_lines(path):
    return sum(part.read_bytes().count(b"\n") - 1 for part in path.glob("process-*.jsonl"))


def literal_scores(model, task, sample, mode):
    """Base score and the score with each head hidden, one plain `generate` after the other."""
    inputs = qwen_batch(
        question(Picture(2, 2 + sample.details["seed"] % 2), seed=sample.details["seed"]), seed=sample.details["seed"]
    )
    scores = []
    for head in (None, *range(NUM_HEADS)):
        with hide_visual_tokens(model, [head], layers=mode):
            out = model.generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
        answer = out[0, inputs["input_ids"].shape[1] :].tolist()
        end = model.generation_config.eos_token_id
        answer = answer[: answer.index(end)] if end in answer else answer
        scores.append(task.score(sample, " ".join(map(str, answer))))
    return scores


@pytest.mark.parametrize("mode", ["first", "all"])
def test_weights_are_the_equations_over_scores_of_plain_generation(model, measured, mode):
    columns = []
    for task, found in zip(tasks(), measured.tasks, strict=True):
        scores = np.array([literal_scores(model, task, sample, mode) for sample in task.samples])
        assert found.base == pytest.approx(scores[:, 0].mean(), abs=1e-12)
        columns.append(scores[:, 0].mean() - scores[:, 1:].mean(axis=0))
    deltas = torch.tensor(np.stack(columns, axis=1))
    result = measured.results[mode]
    assert torch.allclose(result.deltas, deltas, atol=1e-12)
    assert torch.allclose(result.weights, csrc_ref.head_importance(deltas), atol=1e-12)
    assert deltas.std() > 0.01
    assert result.flat_tasks == ()


def test_the_two_ways_of_hiding_are_both_there_and_differ(measured):
    assert measured.layers == "first"
    assert torch.equal(measured.weights, measured.results["first"].weights)
    assert not torch.equal(measured.results["first"].deltas, measured.results["all"].deltas)


def test_one_way_alone_gives_the_same_numbers(model, measured):
    alone = calibrate(model, tasks(), processor=Reader(), layers="all", progress=False)
    assert alone.layers == "all"
    assert torch.equal(alone.weights, measured.results["all"].weights)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_do_not_depend_on_how_heads_are_batched(model, measured, batch_size):
    again = calibrate(model, tasks(), processor=Reader(), layers="both", batch_size=batch_size, progress=False)
    for mode, result in measured.results.items():
        assert torch.equal(again.results[mode].deltas, result.deltas)


def test_scores_do_not_depend_on_the_other_tasks_and_samples(model, measured):
    alone = calibrate(model, tasks()[1], processor=Reader(), progress=False)
    assert torch.equal(alone.results["first"].deltas[:, 0], measured.results["first"].deltas[:, 1])


def test_a_task_that_no_head_moves_counts_as_uniform_and_is_named(model):
    class Easy(Riddles):
        def score(self, sample, answer):
            return 1.0

    found = calibrate(model, [Easy("easy", 3), *tasks()[:1]], processor=Reader(), progress=False)
    result = found.results["first"]
    assert result.flat_tasks == ("easy",)
    with_it, alone = result.weights, csrc_ref.head_importance(result.deltas[:, 1:])
    assert torch.allclose(with_it, (alone + 1 / NUM_HEADS) / 2, atol=1e-12)


def test_the_model_is_left_as_it_was(model):
    model.eval()
    model.lm_head.train()
    before = [len(module._forward_pre_hooks) for module in model.modules()]

    class Broken(Riddles):
        def score(self, sample, answer):
            raise RuntimeError("scorer")

    with pytest.raises(RuntimeError, match="scorer"):
        calibrate(model, Broken("broken"), processor=Reader(), progress=False)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == before
    assert [module for module in model.modules() if module.training] == [model.lm_head]
    model.eval()


def test_a_killed_run_goes_on_where_it_ended_and_finds_the_same(model, measured, repository, tmp_path):
    out = tmp_path / "killed.json"
    journal = tmp_path / "killed.json.journal"
    job = subprocess.Popen(
        [sys.executable, "-m", "tests.calibration_job", str(out), "0.3"],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        while finished_lines(journal) < 4:
            assert job.poll() is None
            time.sleep(0.005)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    kept = finished_lines(journal)
    assert not out.exists()
    assert 4 <= kept < 13
    again = tasks()
    calibrate(model, again, processor=Reader(), out=out, layers="both", progress=False)
    assert len(again[0].asked) + len(again[1].asked) == 13 - kept
    measured.save(tmp_path / "whole.json")
    assert content_of(out) == content_of(tmp_path / "whole.json")


def test_two_processes_find_what_one_does(model, measured, repository, tmp_path):
    out = tmp_path / "two.json"
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    settings = "--mixed_precision no --dynamo_backend no -m tests.calibration_job"
    subprocess.run(
        [sys.executable, "-m", *launch.split(), *settings.split(), str(out), "0"],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=240,
    )
    parts = sorted((tmp_path / "two.json.journal").glob("process-*.jsonl"))
    assert [part.read_bytes().count(b"\n") - 1 for part in parts] == [7, 6]
    measured.save(tmp_path / "one.json")
    assert content_of(out) == content_of(tmp_path / "one.json")
    again = tasks()
    calibrate(model, again, processor=Reader(), out=out, layers="both", progress=False)
    assert again[0].asked == again[1].asked == []


def test_what_is_finished_serves_a_larger_run_and_a_changed_sample_is_asked_again(model, tmp_path):
    out = tmp_path / "weights.json"
    small = Riddles("one", 7)
    calibrate(model, small, processor=Reader(), out=out, limit=3, progress=False)
    assert len(small.asked) == 3
    whole = Riddles("one", 7)
    calibrate(model, whole, processor=Reader(), out=out, progress=False)
    assert len(whole.asked) == 4
    assert not set(whole.asked) & set(small.asked)

    class Reworded(Riddles):
        def prompt(self, sample):
            return sample.question + ("!" if sample.key == "2" else "")

    changed = Reworded("one", 7)
    calibrate(model, changed, processor=Reader(), out=out, progress=False)
    assert changed.asked == ["2"]


def test_a_limit_draws_the_same_samples_for_a_seed_and_others_for_another(model):
    drawn = []
    for seed in (0, 0, 1):
        task = Riddles("many", 50)
        found = calibrate(model, task, processor=Reader(), limit=4, seed=seed, progress=False)
        assert (found.tasks[0].samples, found.tasks[0].total) == (4, 50)
        drawn.append(task.asked)
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(drawn[0], key=int)


def test_the_journal_of_a_model_that_was_trained_further_is_refused(model, tmp_path):
    out = tmp_path / "weights.json"
    calibrate(model, Riddles("one", 2), processor=Reader(), out=out, progress=False)
    other = tiny_model()
    with torch.no_grad():
        other.lm_head.weight.add_(1e-3)
    with pytest.raises(ValueError, match=r"differs in parameters; delete .*weights.json.journal to begin anew"):
        calibrate(other, Riddles("one", 2), processor=Reader(), out=out, progress=False)
    with pytest.raises(ValueError, match="differs in layers"):
        calibrate(model, Riddles("one", 2), processor=Reader(), out=out, layers="all", progress=False)


def test_standard_errors_are_none_for_a_single_sample(model):
    found = calibrate(model, Riddles("one", 1), processor=Reader(), progress=False)
    assert found.standard_errors is None
    assert found.tasks[0].base_standard_error is None
    assert json.loads(json.dumps(found.to_dict()))["standard_errors"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "last"}, "layers: expected 'first', 'all' or 'both', got 'last'"),
        ({"limit": 0}, "limit: expected at least one sample of each task"),
        ({"seed": -1}, "seed: expected a whole number of at least 0, got -1"),
        ({"batch_size": 0}, "batch_size: expected at least one answer at a time, got 0"),
        ({"tasks": []}, "tasks: expected at least one, got none"),
        ({"tasks": [Riddles("a"), Riddles("a")]}, "tasks: expected names of their own, got a more than once"),
        ({"tasks": Riddles("a", 0)}, "a: expected samples, got none"),
        ({"processor": None}, "processor: expected the model's processor, got None for a model without a checkpoint"),
    ],
)
def test_arguments_out_of_range_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate(model, **{"tasks": Riddles("a", 2), "processor": Reader(), "progress": False, **arguments})


@pytest.mark.parametrize("score", [1.5, -0.1, float("nan"), None, "high"])
def test_a_score_out_of_range_names_its_sample(model, score):
    class Wrong(Riddles):
        def score(self, sample, answer):
            return score

    with pytest.raises(ValueError, match=r"wrong, sample 0: cannot be scored: expected a score from 0 to 1, got"):
        calibrate(model, Wrong("wrong", 2), processor=Reader(), progress=False)


@pytest.mark.parametrize(("step", "trouble"), [("encode", "asked"), ("score", "scored")])
def test_whatever_one_sample_causes_names_it_and_keeps_what_is_finished(model, tmp_path, step, trouble):
    class Fragile(Riddles):
        pass

    def fails_at_the_second(self, sample, *rest):
        if sample.key == "1":
            raise KeyError("gone")
        return getattr(Riddles, step)(self, sample, *rest)

    setattr(Fragile, step, fails_at_the_second)
    out = tmp_path / "weights.json"
    with pytest.raises(RuntimeError, match=rf"fragile, sample 1: cannot be {trouble}: KeyError: 'gone'"):
        calibrate(model, Fragile("fragile", 3), processor=Reader(), out=out, progress=False)
    assert finished_lines(tmp_path / "weights.json.journal") == 1


def test_a_place_that_cannot_be_written_is_told_before_anything_is_asked(model, tmp_path, monkeypatch):
    task = Riddles("one", 2)
    with pytest.raises(ValueError, match="out: expected a file to write, got the folder"):
        calibrate(model, task, processor=Reader(), out=tmp_path, progress=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="out: expected a folder that can be written to"):
        calibrate(model, task, processor=Reader(), out=tmp_path / "new" / "weights.json", progress=False)
    assert task.asked == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_task_or_no_sample_or_has_no_prompt_is_said(model):
    with pytest.raises(TypeError, match=r"tasks: expected tasks, got 'chartqa.jsonl'; .*load_tasks"):
        calibrate(model, ["chartqa.jsonl"], processor=Reader(), progress=False)

    class Loose(Riddles):
        samples = ("riddle",)

    with pytest.raises(BadSamplesError, match=r"loose\[0\]: expected a Sample, got str"):
        calibrate(model, Loose("loose"), processor=Reader(), progress=False)

    class Speechless(Riddles):
        def prompt(self, sample):
            raise KeyError("gone")

    with pytest.raises(BadSamplesError, match=r"speechless\[0\]: its prompt failed: KeyError: 'gone'"):
        calibrate(model, Speechless("speechless"), processor=Reader(), progress=False)


def test_samples_of_one_key_and_pictures_that_are_not_there_are_named_before_anything_is_asked(model, tmp_path):
    class Named(Riddles):
        @property
        def samples(self):
            return self.given

    task = Named("named")
    task.given = [Sample("a", "?", origin="file:1"), Sample("a", "?", origin="file:2")]
    with pytest.raises(BadSamplesError, match=r"file:2: expected a key of its own, got 'a', that of file:1"):
        calibrate(model, task, processor=Reader(), progress=False)
    task.given = [Sample("a", "?"), Sample("b", "?"), Sample("a", "!")]
    with pytest.raises(BadSamplesError, match=r"named\[2\]: expected a key of its own, got 'a', that of named\[0\]"):
        calibrate(model, task, processor=Reader(), progress=False)
    (tmp_path / "text.png").write_text("no picture")
    task.given = [
        Sample("a", "?", images=(tmp_path / "gone.png",), origin="file:1"),
        Sample("b", "?", images=(str(tmp_path / "text.png"),), origin="file:2"),
        Sample("c", "?", videos=(tmp_path / "gone.mp4",), origin="file:3"),
    ]
    with pytest.raises(BadSamplesError, match="3 problems") as caught:
        calibrate(model, task, processor=Reader(), progress=False)
    places = sorted(problem.split(": ")[0] for problem in caught.value.problems)
    assert places == ["file:1", "file:2", "file:3"]
    assert task.asked == []


def test_prune_reads_the_file_and_warns_about_another_model(model, measured, tmp_path):
    path = tmp_path / "weights.json"
    measured.save(path)
    inputs = qwen_batch(question(Picture(3, 3)))
    with prune(model, 0.5, head_weights=path) as pruning:
        model(**inputs)
    assert pruning.stats.head_weights == "file weights.json"
    with prune(model, 0.5, head_weights=measured.weights) as given:
        model(**inputs)
    assert torch.equal(pruning.scores, given.scores)
    from tests.tiny_models import qwen_vl

    deeper = qwen_vl(heads=NUM_HEADS, layers=3)
    with pytest.warns(UserWarning, match=r"expected head weights of this model, got those of .* \(num_hidden_layers 2"):
        prune(deeper, 0.5, head_weights=path)
    with pytest.raises(ValueError, match="expected 8 weights, one for each attention head of the model, got 4"):
        prune(qwen_vl(heads=8, layers=2), 0.5, head_weights=path)


def test_the_file_says_what_was_measured_and_how(measured, model, tmp_path):
    path = tmp_path / "weights.json"
    measured.save(path)
    content = json.loads(path.read_text())
    assert content["layer"] == 0
    assert dissect(model).text.layers[0].self_attn is attention_modules(dissect(model), "first")[0]
    assert content["layers"] == "first"
    assert [task["name"] for task in content["tasks"]] == ["one", "two"]
    assert [task["samples"] for task in content["tasks"]] == [7, 6]
    assert content["weights"] == measured.weights.tolist()
    assert content["deltas"] == measured.results["first"].deltas.tolist()
    assert np.array(content["deltas"]).shape == np.array(content["delta_standard_errors"]).shape == (NUM_HEADS, 2)
    assert content["other_layers"]["all"]["weights"] == measured.results["all"].weights.tolist()
    assert content["fingerprint"]["num_attention_heads"] == NUM_HEADS
    assert {"torch", "transformers", "hawk_kernels", "python"} == set(content["versions"])
    assert content["settings"]["seed"] == 0
    # a matrix is read row by row
    assert any(line.count(",") == 1 and line.strip().startswith("[") for line in path.read_text().splitlines())
    assert not list(tmp_path.glob("*.tmp"))


def test_a_weights_file_read_back_is_the_same_calibration(measured, tmp_path):
    path = tmp_path / "weights.json"
    measured.save(path)
    content = json.loads(path.read_text())
    read = Calibration.from_dict(content, "weights.json")
    assert read.to_dict() == content
    assert torch.equal(read.weights, measured.weights)
    assert read.tasks == measured.tasks
    assert list(read.results) == ["first", "all"]


def test_weights_alone_are_a_calibration_that_knows_nothing_else():
    read = Calibration.from_dict({"weights": [0.25, 0.75]}, "plain.json")
    assert read.weights.tolist() == [0.25, 0.75]
    assert (read.model, read.layer, read.tasks, read.standard_errors) == ("", None, (), None)
    assert read.results[""].deltas is None


@pytest.mark.parametrize("kept", [b"not weights", b'{"name": "package"}'])
def test_calibrate_replaces_nothing_but_weights(model, tmp_path, kept):
    out = tmp_path / "package.json"
    out.write_bytes(kept)
    task = Riddles("one", 2)
    with pytest.raises(ValueError, match="exists and is not a file of head weights, so it is not replaced"):
        calibrate(model, task, processor=Reader(), out=out, progress=False)
    assert (task.asked, out.read_bytes()) == ([], kept)


def test_a_benchmark_that_is_never_answered_right_is_refused(model):
    class Hopeless(Riddles):
        def score(self, sample, answer):
            return 0.0

    with pytest.raises(ValueError, match=r"hopeless: expected a score above zero with nothing masked, got 0 on all 2"):
        calibrate(model, Hopeless("hopeless", 2), processor=Reader(), progress=False)


def test_names_are_written_as_they_are(model, tmp_path):
    path = tmp_path / "weights.json"
    calibrate(model, Riddles("[ 1,  2 ] é", 1), processor=Reader(), out=path, progress=False)
    assert json.loads(path.read_text(encoding="utf-8"))["tasks"][0]["name"] == "[ 1,  2 ] é"


PLAN = {"layers": ["first"], "seed": 1}


def test_a_journal_cut_anywhere_keeps_all_whole_lines(tmp_path):
    with Journal(tmp_path / "whole", PLAN, 0) as journal:
        for i in range(3):
            journal.add(("task", str(i), "asked"), {"base": i / 3, "answer": "é"})
    (path,) = (tmp_path / "whole").iterdir()
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / path.name).write_bytes(content[:cut])
        whole = max(0, content[:cut].count(b"\n") - 1)
        journal = Journal(folder, PLAN, 0)
        assert len(journal.read()) == whole
        with journal:
            journal.add(("task", "next", "asked"), {"base": 1.0})
        found = journal.read()
        assert len(found) == whole + 1
        assert found["task", "next", "asked"]["base"] == 1.0


def test_broken_and_busy_journals_are_refused(tmp_path):
    with Journal(tmp_path, PLAN, 0) as journal:
        journal.add(("task", "0", "asked"), {"base": 1.0})
        with pytest.raises(ValueError, match="another calibration is writing to it"), Journal(tmp_path, PLAN, 0):
            pass
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + b"not json\n")
    with pytest.raises(ValueError, match=r"process-00000.jsonl:3: expected a line of the calibration's journal"):
        journal.read()
    with pytest.raises(ValueError, match="differs in seed"):
        Journal(tmp_path, {**PLAN, "seed": 2}, 0).read()
    with pytest.raises(RuntimeError, match="inside its with block only"):
        journal.add(("task", "1", "asked"), {})


def test_few_samples_are_reported(model):
    with pytest.warns(
        UserWarning, match=r"one: 2 samples are few; the score .* standard error of .*take 100 or more"
    ) as said:
        calibrate(model, Riddles("one", 2), processor=Reader(), progress=False)
    assert said[0].filename == __file__
