"""Evaluation from start to end: what it measures, what it keeps when it is killed, and what its intervals are."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from hawk_kernels import prune
from hawk_kernels.evaluation import Contender, evaluate
from hawk_kernels.evaluation.contenders import UNPRUNED, Way, check_contenders, split_words
from hawk_kernels.evaluation.intervals import Questions, interval, relative_scores, resampling_weights
from hawk_kernels.evaluation.output import check_folder, write_results
from hawk_kernels.evaluation.result import summarise
from hawk_kernels.evaluation.run import checked_keeps
from hawk_kernels.evaluation.stages import Stages, share, stages_from_text
from hawk_kernels.evaluation.text import markdown
from hawk_kernels.methods import METHODS, Method
from tests.calibration_job import Reader, Riddles, tiny_model
from tests.tiny_models import Picture, question, qwen_batch

METHODS_COMPARED = ["hawk:head_weights=uniform", "divprune", "fastv:layer=1"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tasks():
    return [Riddles("one", 4), Riddles("two", 3)]


def evaluated(model, tasks, **options):
    given = {"methods": METHODS_COMPARED, "keep": (0.5, 2), "processor": Reader(), "progress": False, **options}
    with pytest.warns(UserWarning, match="are few"):
        return evaluate(model, tasks, **given)


@pytest.fixture(scope="module")
def found(model, tasks):
    return evaluated(model, tasks)


@pytest.fixture(scope="module")
def direct(model):
    """What `tests.evaluation_job` finds, without a journal and in one go."""
    return evaluated(model, Riddles("one", 5), methods=["divprune", "random"], keep=[0.5])


def untimed(evaluation):
    """What an evaluation found, without what differs from run to run."""
    content = evaluation.to_dict()
    content.pop("date")
    for entry in (content["unpruned"], *content["methods"]):
        for name in [name for name in entry if name.endswith(("_ms", "_speedup"))]:
            entry.pop(name)
    return content


def test_scores_and_tokens_are_those_of_plain_generation(model, tasks, found):
    ways = {
        "hawk:head_weights=uniform": {"method": "hawk", "head_weights": "uniform"},
        "divprune": {"method": "divprune"},
        "fastv:layer=1": {"method": "fastv", "layer": 1},
    }
    for label, options in ways.items():
        for keep in (0.5, 2):
            means, tokens = [], []
            for task in tasks:
                scores = []
                for sample in task.samples:
                    seed = sample.details["seed"]
                    inputs = qwen_batch(question(Picture(2, 2 + seed % 2), seed=seed), seed=seed)
                    with prune(model, keep, **options) as pruning:
                        out = model.generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
                    answer = out[0, inputs["input_ids"].shape[1] :].tolist()
                    scores.append(task.score(sample, " ".join(map(str, answer))))
                    tokens.append(pruning.stats.samples[0].visual_tokens_after)
                means.append(np.mean(scores))
                assert found.of(label, keep).scores[task.name] == pytest.approx(means[-1])
            assert found.of(label, keep).score == pytest.approx(np.mean(means))
            assert found.of(label, keep).visual_tokens == pytest.approx(np.mean(tokens))


def test_memory_and_times_are_those_of_the_prompt(model, found):
    whole, hawk = found.unpruned, found.of("hawk:head_weights=uniform", 0.5)
    text = model.config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * 4
    saved = (whole.visual_tokens - hawk.visual_tokens) * per_token
    assert whole.cache_bytes - hawk.cache_bytes == pytest.approx(saved)
    for result in found.methods:
        assert result.first_token_ms > 0
        assert result.next_token_ms > 0
        assert result.first_token_speedup > 0


def literal_relative(scores, whole, groups, kinds, draws):
    """The mean over kinds of the sum of scores over the sum of those unpruned, groups drawn `draws` times each."""
    shares = []
    for kind in dict.fromkeys(kinds):
        few = all_ = 0.0
        for score, base, group, of in zip(scores, whole, groups, kinds, strict=True):
            if of == kind:
                few, all_ = few + draws[group] * score, all_ + draws[group] * base
        shares.append(few / all_ if all_ else float("nan"))
    return float(np.mean(shares))


def test_intervals_are_a_bootstrap_over_pictures_with_differences_paired():
    chance = np.random.default_rng(3)
    kinds = ["a", "b"] * 20
    groups = [f"picture {i // 4}" for i in range(40)]
    whole, first, second = (
        [{"score": score, "options": {}, "cache_bytes": 1, "first_token": 1.0, "next_token": None} for score in scores]
        for scores in (0.2 + 0.8 * chance.random(40), chance.random(40), chance.random(40))
    )
    more = {"visual_tokens_before": 4, "visual_tokens_after": 2, "tokens_per_layer": 3, "layers": [1]}
    more["beside"] = {"first_token": 3.0, "next_token": None}
    contenders = [Contender("first", "hawk"), Contender("second", "random")]
    pruned = {
        Way(contender, 0.5): [record | more for record in records]
        for contender, records in zip(contenders, (first, second), strict=True)
    }
    _, results = summarise(kinds, groups, whole, pruned)
    numbers = [i // 4 for i in range(40)]
    weights = resampling_weights(np.array(["a\nb"] * 10))
    values = [
        np.array(
            [
                literal_relative([r["score"] for r in of], [r["score"] for r in whole], numbers, kinds, row)
                for row in weights
            ]
        )
        for of in (first, second)
    ]
    for result, literal in zip(results, values, strict=True):
        low, high = np.percentile(100 * literal[1:], (2.5, 97.5))
        assert result.relative == pytest.approx({"percent": 100 * literal[0], "low": low, "high": high}, abs=0.006)
        assert result.first_token_speedup == 3.0
        assert result.next_token_speedup is None
    low, high = np.percentile(100 * (values[0] - values[1])[1:], (2.5, 97.5))
    behind = {"percent": 100 * (values[0] - values[1])[0], "low": low, "high": high}
    assert results[0].behind_first is None
    assert results[1].behind_first == pytest.approx(behind, abs=0.006)


def test_a_resample_without_a_right_answer_does_not_count():
    questions = Questions(np.array(["a", "a"]), np.array([0, 1]), np.array(["s", "s"]), ("a",))
    weights = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    values = relative_scores(questions, np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]]), weights)[:, 0, 0]
    assert values[:2].tolist() == [1.0, 1.0]
    assert np.isnan(values[2])
    assert interval(values) == {"percent": 100.0, "low": 100.0, "high": 100.0}


def test_a_task_on_which_the_model_scores_nothing_is_left_out_and_told(model):
    class Hopeless(Riddles):
        def score(self, sample, answer):
            return 0.0

    found = evaluated(model, [Riddles("one", 3), Hopeless("two", 2)], methods=["divprune"], keep=[0.5])
    (result,) = found.methods
    assert list(result.relative_by_task) == ["one"]
    assert any("two: the model scores 0 with nothing pruned" in doubt for doubt in found.doubts())
    nothing = evaluate(model, Hopeless("two", 2), methods=["divprune"], keep=[0.5], processor=Reader(), progress=False)
    assert nothing.methods[0].relative is None
    assert "| - |" in markdown(nothing)


def test_the_same_call_asks_nothing_twice_and_a_new_method_alone(model, tmp_path, monkeypatch):
    task, asked = Riddles("one", 3), []
    before = evaluated(model, task, methods=["divprune"], out=tmp_path / "out")
    monkeypatch.setattr(type(model), "generate", _noted(type(model).generate, asked))
    again = evaluated(model, task, methods=["divprune"], out=tmp_path / "out")
    trials = len(asked)
    assert trials == 2
    assert untimed(again) == untimed(before)
    more = evaluated(model, task, methods=["divprune", "random"], out=tmp_path / "out")
    # beside its two keep ratios each question is asked unpruned once more, for the times; and three trials
    assert len(asked) - trials == 3 * 3 + 3
    assert untimed(more)["methods"][:2] == untimed(before)["methods"]


def _noted(generate, asked):
    def noted(self, **inputs):
        asked.append(inputs)
        return generate(self, **inputs)

    return noted


def test_a_killed_run_goes_on_where_it_ended_and_finds_the_same(direct, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.evaluation_job", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "0.3"], env=environment)
    journal = out / "journal" / "process-00000.jsonl"
    deadline = time.monotonic() + 120
    while not journal.is_file() or journal.read_bytes().count(b"\n") < 6:
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = journal.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    subprocess.run([*command, "0"], env=environment, check=True, timeout=120)
    assert journal.read_bytes().startswith(kept)
    content = json.loads((out / "results.json").read_text())
    for result, expected in zip(content["methods"], direct.methods, strict=True):
        assert result["scores"] == expected.scores
        assert result["relative"] == expected.relative


def test_two_processes_share_the_questions(direct, tmp_path):
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    settings = "--mixed_precision no --dynamo_backend no -m tests.evaluation_job"
    command = [sys.executable, "-m", *launch.split(), *settings.split(), str(tmp_path / "out"), "0"]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=240, capture_output=True)
    parts = sorted((tmp_path / "out" / "journal").glob("process-*.jsonl"))
    assert [len(part.read_text().splitlines()) > 1 for part in parts] == [True, True]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["scores"] for result in content["methods"]] == [result.scores for result in direct.methods]


def test_a_method_that_cannot_serve_the_model_is_told_and_the_others_go_on(model, monkeypatch, tmp_path):
    class Picky(Method):
        name = "picky"

        def score(self, view):
            raise TypeError("method: expected a model with wings, got one without; use method='hawk'")

    monkeypatch.setitem(METHODS, "picky", Picky)
    found = evaluated(model, Riddles("one", 2), methods=["divprune", "picky"], out=tmp_path / "out")
    assert found.refused == {"picky": "method: expected a model with wings, got one without; use method='hawk'"}
    assert {result.method for result in found.methods} == {"divprune"}
    assert "expected a model with wings" in (tmp_path / "out/report.html").read_text()
    with pytest.raises(ValueError, match="methods: expected one that can serve the model, got none: picky: method: "):
        evaluate(model, Riddles("one", 2), methods=["picky"], processor=Reader(), progress=False)


def test_files_are_whole_and_replace_nothing_else(model, found, tmp_path):
    write_results(found, tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["methods"][0]["method"] == "hawk:head_weights=uniform"
    page = (tmp_path / "report.html").read_text()
    assert page.count("src=") == page.count('src="data:image/png;base64,') == 1
    assert "http://" not in page
    assert "https://" not in page
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    check_folder(tmp_path)
    (tmp_path / "results.md").write_text("my notes\n")
    with pytest.raises(ValueError, match=r"results\.md exists and is not a file that an earlier evaluation wrote"):
        evaluate(model, Riddles("one", 2), methods=["random"], processor=Reader(), out=tmp_path, progress=False)
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        check_folder(tmp_path / "results.md")


def test_names_are_text_in_every_file(model, tmp_path):
    task = Riddles("a|b <i>$x$</i>", 2)
    evaluated(model, task, methods=[Contender("_$m$ <b>", "random")], keep=[0.5], out=tmp_path / "out")
    assert "a\\|b &lt;i>$x$" in (tmp_path / "out/results.md").read_text()
    assert "<b>" not in (tmp_path / "out/report.html").read_text().replace("<body>", "")


@pytest.mark.parametrize(
    ("text", "method", "options"),
    [
        ("divprune", "divprune", {}),
        (" fastv : layer=2 ", "fastv", {"layer": 2}),
        ("hawk:normalize=none,rounding=ceil", "hawk", {"normalize": None, "rounding": "ceil"}),
        ('hawk:{"normalize": null, "budget": "per_image"}', "hawk", {"normalize": None, "budget": "per_image"}),
        ("hiprune:alpha=0.2", "hiprune", {"alpha": 0.2}),
        ("cdpruner:negate=true", "cdpruner", {"negate": True}),
        ("hawk:head_weights=/a:b/w.json", "hawk", {"head_weights": "/a:b/w.json"}),
        ("divprune-release", "divprune", {"recipe": "divprune-release"}),
        ("cdpruner-release:theta=0.5", "cdpruner", {"recipe": "cdpruner-release", "theta": 0.5}),
    ],
)
def test_a_method_is_spelled_with_its_options(text, method, options):
    contender = Contender.from_text(text)
    assert (contender.label, contender.method, dict(contender.options)) == (text.strip(), method, options)
    assert contender.after is None
    check_contenders([contender])


@pytest.mark.parametrize(
    ("text", "method", "after", "options"),
    [
        ("cdpruner@2", "cdpruner", 2, {}),
        ("cdpruner @ 0", "cdpruner", 0, {}),
        ("hawk@2:head_weights=uniform", "hawk", 2, {"head_weights": "uniform"}),
        ('dart@1:{"pivots": 2}', "dart", 1, {"pivots": 2}),
        ("sparsevlm-release@3", "sparsevlm", 3, {"recipe": "sparsevlm-release"}),
    ],
)
def test_a_method_is_spelled_with_the_layer_after_which_it_chooses(text, method, after, options):
    contender = Contender.from_text(text)
    assert (contender.method, contender.after, dict(contender.options)) == (method, after, options)
    assert contender.keep_ratio(0.4) == {after: 0.4}
    check_contenders([contender])
    assert contender.key != Contender(text, method, options).key


@pytest.mark.parametrize(
    ("text", "stages", "in_tables"),
    [
        ("2:0.4", {2: 0.4}, "2: 40 %"),
        ("0:0.5,2:0.25", {0: 0.5, 2: 0.25}, "0: 50 %, 2: 25 %"),
        (" 0 : 0.5 , 2 : fastv : 64 ", {0: 0.5, 2: ("fastv", 64)}, "0: 50 %, 2: fastv 64 tokens"),
    ],
)
def test_stages_are_spelled_as_layers_and_what_they_keep(text, stages, in_tables):
    read = stages_from_text(text, lambda number: float(number) if "." in number else int(number))
    assert (read, share(read)) == (stages, in_tables)
    (kept,) = checked_keeps([read])
    assert kept == stages
    assert {kept: "a key"}[Stages(stages)] == "a key"


def test_stages_in_another_order_are_the_same_and_ask_nothing_new():
    one, other = (checked_keeps([stages])[0] for stages in ({2: 0.25, 0: 0.5}, {0: 0.5, 2: 0.25}))
    contender = Contender("hawk", "hawk")
    assert Way(contender, one) == Way(contender, other)
    assert Way(contender, one).key == Way(contender, other).key != Way(contender, 0.25).key


def test_head_weights_of_the_run_reach_the_stages_that_use_them(model):
    plain, given = (Contender("dart", "dart", head_weights=weights) for weights in (None, "uniform"))
    (staged,) = checked_keeps([{0: ("hawk", 0.5), 1: 0.25}])
    assert Way(given, staged).key != Way(plain, staged).key
    assert Way(given, 0.25).key == Way(plain, 0.25).key
    riddles = Riddles("one", 1)
    inputs = riddles.encode(riddles.samples[0], None)
    own = Contender("dart", "dart", {"head_weights": "uniform"}, head_weights="no such file")
    for contender in (given, own):
        with contender.block(model, staged) as pruning:
            model.generate(**inputs, max_new_tokens=1)
        assert pruning.stats.head_weights == "uniform"


def test_method_objects_in_stages_differ_by_their_options_and_can_be_written(model, tmp_path):
    contender = Contender("divprune", "divprune")
    floor, ceil = ({0: (METHODS["random"](rounding=rounding), 0.5), 1: 0.25} for rounding in ("floor", "ceil"))
    first, second = (Way(contender, keep) for keep in checked_keeps([floor, ceil]))
    assert first.key != second.key
    found = evaluated(model, Riddles("one", 2), methods=["divprune"], keep=[ceil], out=tmp_path / "out")
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["methods"]
    assert row["keep"]["1"] == 0.25
    name, share_kept = row["keep"]["0"]
    assert (name.startswith("random"), "ceil" in name, share_kept) == (True, True, 0.5)
    assert found.of("divprune", ceil).layers == (0, 1)


@pytest.mark.parametrize("text", ["2:", ":0.4", "two:0.4", "2:0.4,", "-1:0.4", "2:fastv:", "2:a:b:0.4", "0:0.5,0.4"])
def test_misspelled_stages_are_told_with_an_example(text):
    with pytest.raises(ValueError, match=r"expected stages LAYER:KEEP or LAYER:METHOD:KEEP.* such as 2:0.4"):
        stages_from_text(text, float)


def test_a_layer_that_comes_twice_is_told():
    with pytest.raises(ValueError, match=r"expected each layer once, got '2:0.4,2:0.2'; leave out one of the stages"):
        stages_from_text("2:0.4,2:0.2", float)


def test_stages_are_asked_as_prune_takes_them_and_shown_with_their_cost(model, tasks, tmp_path):
    methods = ["divprune", "divprune@1", "random:seed=3"]
    staged = {0: 0.5, 1: ("fastv", 0.25)}
    found = evaluated(model, tasks, methods=[*methods[:1], methods[2]], keep=[0.5, staged], out=tmp_path / "out")
    at_one = evaluated(model, tasks, methods=[methods[1]], keep=[0.5, 2])
    depth = model.config.get_text_config().num_hidden_layers
    before, left = found.unpruned.visual_tokens, found.of("divprune", staged)
    assert (left.layers, at_one.of("divprune@1", 2).layers, found.of("divprune", 0.5).layers) == ((0, 1), (1,), (0,))
    assert found.of("divprune", 0.5).tokens_per_layer == found.of("divprune", 0.5).visual_tokens
    assert at_one.of("divprune@1", 2).tokens_per_layer == pytest.approx((before + (depth - 1) * 2) / depth)
    halved = found.of("divprune", 0.5).visual_tokens
    assert left.tokens_per_layer == pytest.approx((halved + (depth - 1) * left.visual_tokens) / depth)
    for task in tasks:
        scores = []
        for sample in task.samples:
            seed = sample.details["seed"]
            inputs = qwen_batch(question(Picture(2, 2 + seed % 2), seed=seed), seed=seed)
            with prune(model, staged, method="divprune"):
                out = model.generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)
            scores.append(task.score(sample, " ".join(map(str, out[0, inputs["input_ids"].shape[1] :].tolist()))))
        assert left.scores[task.name] == pytest.approx(np.mean(scores))
    assert found.of("random:seed=3", staged).behind_first is not None
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert content["methods"][1]["keep"] == {"0": 0.5, "1": ["fastv", 0.25]}
    assert "| divprune | 0: 50 %, 1: fastv 25 % | 0, 1 | " in (tmp_path / "out/results.md").read_text()
    assert "0: 50 %, 1: fastv 25 %" in (tmp_path / "out/report.html").read_text()


def test_a_method_that_cannot_choose_in_some_stages_is_left_out_of_these_alone(model):
    later, earlier = {1: 0.5}, {0: 0.5, 1: 0.25}
    found = evaluated(model, Riddles("one", 2), methods=["fastv", "divprune"], keep=[later, earlier])
    rows = [(result.method, result.keep) for result in found.methods]
    assert rows == [("fastv", later), ("divprune", later), ("divprune", earlier)]
    assert list(found.refused) == ["fastv at 0:0.5,1:0.25"]
    (reason,) = found.refused.values()
    assert reason.startswith("method: expected one that can choose before the first layer for stage 0, got 'fastv'")
    assert found.of("divprune", later).behind_first is not None
    assert found.of("divprune", earlier).behind_first is None


@pytest.mark.parametrize(
    ("methods", "keep", "message"),
    [
        (["divprune@"], [0.5], "write after which layer the method chooses, counted from 1, as in cdpruner@2"),
        (["divprune@two"], [0.5], r"methods: expected NAME, NAME@LAYER or NAME:OPTION=VALUE,..., got 'divprune@two'"),
        (["divprune@1"], [{1: 0.5}], r"methods: divprune@1 at 1:0.5: expected the layers in the method or in the keep"),
        (["fastv:layer=1"], [{1: 0.5}], r"methods: fastv:layer=1 at 1:0.5: options 'layer' came beside stages"),
        (["hawk@1"], [0.5], r"methods: hawk@1: head_weights: expected those of layer 2.*head_weights='uniform'"),
        (["divprune@99"], [0.5], r"methods: divprune@99: .*99"),
        (["divprune"], [{0: 0.2, 1: 0.5}], r"methods: divprune at 0:0.2,1:0.5: keep_ratio\[1\]: expected at most 0.2"),
        (["divprune"], [{1: ("tea", 0.5), 2: 0.2}], r"keep: 1:tea:0.5,2:0.2: method: expected one of"),
        (["divprune"], [{1: ("fastv", 0.5)}], r"keep: expected a stage that leaves its method to the comparison"),
        (["divprune"], [{}], r"keep: expected a stage that leaves its method to the comparison, got 'no stage'"),
        (["divprune"], [{"1": 0.5}], r"keep: expected layers as ints, got '1'"),
    ],
)
def test_mistakes_in_stages_are_told_before_anything_is_asked(methods, keep, message, model):
    task = Riddles("one", 2)
    with pytest.raises((TypeError, ValueError), match=message):
        evaluate(model, task, methods=methods, keep=keep, processor=Reader(), progress=False)
    assert not task.asked


def test_commas_separate_methods_and_options():
    words = ["hawk:normalize=none,rounding=ceil,divprune", "fastv:layer=2,random", 'hawk:{"a": 1, "b": 2}', "dart,"]
    assert split_words(words) == [
        "hawk:normalize=none,rounding=ceil",
        "divprune",
        "fastv:layer=2",
        "random",
        'hawk:{"a": 1, "b": 2}',
        "dart",
    ]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["tea_leaves"], "methods: tea_leaves: method: expected one of"),
        (["fastv:depth=2"], "methods: fastv:depth=2: method 'fastv' has no option 'depth'"),
        (["fastv:layer=0"], "methods: fastv:layer=0: layer: expected"),
        (["fastv:"], "leave out the colon"),
        (["fastv:layer"], "write 'layer' as OPTION=VALUE"),
        (["hawk:{oops"], "whose options are no JSON object"),
        (["divprune", "divprune"], "got divprune more than once"),
        (["divprune:budget=whole"], "methods: divprune:budget=whole: budget: expected 'shared' or 'per_image'"),
        (["hawk"], "methods: hawk: head_weights"),
        ([], "methods: expected at least one"),
    ],
)
def test_mistakes_in_methods_are_told_before_anything_is_asked(methods, message, model):
    task = Riddles("one", 2)
    with pytest.raises(ValueError, match=message):
        evaluate(model, task, methods=methods, processor=Reader(), progress=False)
    assert not task.asked


def test_keep_ratios_are_checked():
    assert checked_keeps([1.0, 0.4, 64]) == [0.4, 64]
    for keep, message in (([1.0], "got none"), ([], "got none"), ([0.2, 0.2], "each keep ratio once")):
        with pytest.raises(ValueError, match=message):
            checked_keeps(keep)
    with pytest.raises(ValueError, match="keep: expected"):
        checked_keeps([1.5])


def test_a_key_follows_the_content_of_a_weights_file(tmp_path):
    path = tmp_path / "w.json"
    contender = Contender("hawk", "hawk", {"head_weights": str(path)})
    keys = []
    for weights in ([0.5, 0.5], [0.4, 0.6]):
        path.write_text(json.dumps({"weights": weights}))
        keys.append(Way(contender, 0.5).key)
    assert keys[0] != keys[1]
    tensors = [Contender("hawk", "hawk", {"head_weights": torch.tensor([0.5, w])}).key for w in (0.5, 0.25)]
    assert tensors[0] != tensors[1]
    assert UNPRUNED.key not in keys


def test_an_error_names_the_question(model):
    class Broken(Riddles):
        def score(self, sample, answer):
            return "right"

    with pytest.raises(ValueError, match=r"one, sample 0: cannot be scored: expected a score from 0 to 1, got 'right'"):
        evaluate(model, Broken("one", 2), methods=["random"], processor=Reader(), progress=False)
