"""lmms-eval's own command line on a local task, against transformers and `prune` on the same documents."""

import pytest

from hawk_kernels import calibration
from hawk_kernels.tasks.sources import load_tasks
from tests.on_lmms.local_task import NAME, WRONG_PROMPT
from tests.on_lmms.runs import BASE, RunError, answers_of_transformers, run_lmms_eval, through_jpeg


@pytest.fixture(scope="module")
def expected(documents):
    """Answers by the name of the run, at 20 %."""
    runs = {
        "hawk": {"method": "hawk"},
        "divprune": {"method": "divprune"},
        "divprune of JPEGs": {"method": "divprune", "shown": through_jpeg},
        "fastv": {"method": "fastv", "layer": 1},
    }
    pruned = {name: answers_of_transformers(documents, keep_ratio=0.2, **run) for name, run in runs.items()}
    return {"unpruned": answers_of_transformers(documents), **pruned}


def score_of(answers, documents):
    right = [answer.strip().lower() == document["answer"] for answer, document in zip(answers, documents, strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize(
    ("name", "model", "model_args", "flags", "processes"),
    [
        ("unpruned", "qwen2_5_vl", "", (), 1),
        ("hawk", "hawk", "base=qwen2_5_vl,keep_ratio=0.2,", (), 1),
        ("hawk", "hawk", "base=qwen2_5_vl,keep_ratio=0.2,", (), 2),
        ("divprune of JPEGs", "hawk", "base=qwen2_5_vl,keep_ratio=0.2,method=divprune,", ("--force_simple",), 1),
        ("fastv", "hawk", "base=qwen2_5_vl,keep_ratio=0.2,method=fastv,layer=1,", (), 1),
    ],
    ids=["unpruned", "pruned", "two_ranks", "simple", "inside_the_stack"],
)
def test_scores_equal_those_of_transformers_and_prune(
    folder, documents, expected, assert_equal_answers, tmp_path, request, name, model, model_args, flags, processes
):
    run = run_lmms_eval(folder, tmp_path, model, model_args + BASE, *flags, processes=processes)
    assert_equal_answers(f"lmms-eval, {request.node.callspec.id}, {name}", run.answers, expected[name])
    assert run.score == pytest.approx(score_of(expected[name], documents))


def test_pruning_changes_answers(expected, documents):
    scores = {name: score_of(answers, documents) for name, answers in expected.items()}
    assert scores["unpruned"] > 0.95
    assert all(scores[name] < scores["unpruned"] for name in ("hawk", "divprune"))
    assert expected["hawk"] != expected["divprune"]


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ("keep_ratio=0.2", r"base: expected the name of a model of lmms-eval, got None"),
        ("base=hawk,keep_ratio=0.2", r"base: expected the name of a model of lmms-eval, got 'hawk'"),
        ("base=qwen2_5_vl", r"keep_ratio: expected a float in \(0, 1\] or a number of tokens, got nothing"),
        ("base=qwen2_5_vl,keep_ratio=1.5", r"keep_ratio: expected a float in \(0, 1\]"),
        (
            "base=dummy,keep_ratio=0.2",
            r"base: expected a model of lmms-eval that holds a transformers model, got Dummy",
        ),
    ],
)
def test_arguments_that_cannot_be_used_are_named_before_anything_is_asked(model_args, message):
    from lmms_eval.models import get_model

    base = BASE if "qwen" in model_args else ""
    arguments = f"{model_args},{base}".strip(",")
    with pytest.raises((TypeError, ValueError), match=message):
        get_model("hawk").create_from_arg_string(arguments, {"device": "cpu", "batch_size": 1})


def test_a_failed_run_is_noticed_though_it_exits_with_0(folder, documents, tmp_path):
    with pytest.raises(RunError, match=r"(?s)exited with 0.*keep_ratio: expected a float"):
        run_lmms_eval(folder, tmp_path, "hawk", f"base=qwen2_5_vl,keep_ratio=3.5,{BASE}")


def test_stages_are_written_as_json():
    from lmms_eval.models import get_model

    arguments = f'base=qwen2_5_vl,keep_ratio={{"0": 0.5, "2": ["fastv", 0.2]}},{BASE}'
    built = get_model("hawk").create_from_arg_string(arguments, {"device": "cpu", "batch_size": 1})
    assert type(built).__name__ == "Qwen2_5_VL"
    assert not built.is_simple


def test_a_recipe_brings_its_method_and_takes_its_options():
    from lmms_eval.models import get_model

    def build(arguments):
        given = {"device": "cpu", "batch_size": 1}
        return get_model("hawk").create_from_arg_string(f"base=qwen2_5_vl,keep_ratio=0.2,{arguments},{BASE}", given)

    assert type(build("recipe=fastv-release,layer=1")).__name__ == "Qwen2_5_VL"
    with pytest.raises(ValueError, match=r"recipe: expected one of .*'fastv-release'.*, got 'tea'"):
        build("recipe=tea")
    with pytest.raises(TypeError, match=r"positions: expected 'original' for qwen2_5_vl, got 'packed'"):
        build("method=divprune,positions=packed")


def test_prompts_of_other_models_stay_theirs(folder, documents):
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager

    get_model("hawk").create_from_arg_string(
        f"base=qwen2_5_vl,keep_ratio=0.2,{BASE}", {"device": "cpu", "batch_size": 1}
    )
    for model, question in (("hawk", documents[0]["question"]), ("internvl3", WRONG_PROMPT), (None, WRONG_PROMPT)):
        manager = TaskManager(include_path=str(folder), include_defaults=False, model_name=model)
        task = manager.load_task_or_group([NAME])[NAME]
        assert task.doc_to_text(documents[0]) == question


def test_a_task_of_ones_own_can_be_calibrated_on(folder, documents):
    (task,) = load_tasks([f"lmms:{NAME}@{folder}"])
    assert isinstance(task, calibration.Task)
    assert len(task.samples) == len(documents)
    sample = task.samples[3]
    assert task.score(sample, documents[3]["answer"]) == 1
    assert task.score(sample, "nothing") == 0
    assert len(sample.images) == len(documents[3]["images"])
    with pytest.raises(ValueError, match="expected a task of lmms-eval, got 'tinyvqa_local'"):
        load_tasks([f"lmms:{NAME}"])
