"""What head weights are worth: scores of the same questions with the weights and with uniform heads."""

import json
import re

import numpy as np
import pytest
import torch

from hawk_kernels import prune
from hawk_kernels.__main__ import main
from hawk_kernels.calibration import Worth, worth_of_weights
from hawk_kernels.calibration.worth import _standard_error
from hawk_kernels.checkpoint import TINY_MODEL
from tests.calibration_job import NUM_HEADS, Reader, Riddles, tiny_model

WEIGHTS = torch.tensor([0.7, 0.1, 0.2, 0.0])


@pytest.mark.parametrize("reduce", ["mean", "max"])
@torch.no_grad()
def test_the_scores_are_those_of_the_answers(reduce):
    """Two benchmarks of different length count the same."""
    model, tasks = tiny_model(), [Riddles("one", 3), Riddles("two", 2)]
    found = worth_of_weights(model, tasks, WEIGHTS, keep_ratio=0.5, reduce=reduce, processor=Reader(), progress=False)
    expected = []
    for head_weights in (None, WEIGHTS, "uniform"):
        means = []
        for task in tasks:
            scores = []
            for sample in task.samples:
                inputs = task.encode(sample, None)
                settings = {"do_sample": False, "max_new_tokens": task.max_new_tokens}
                if head_weights is None:
                    tokens = model.generate(**inputs, **settings)
                else:
                    with prune(model, 0.5, head_weights=head_weights, reduce=reduce):
                        tokens = model.generate(**inputs, **settings)
                answer = Reader().decode(tokens[0, inputs["input_ids"].shape[1] :].tolist())
                scores.append(task.score(sample, answer))
            means.append(np.mean(scores))
        expected.append(np.mean(means))
    assert [found.whole, found.weighted, found.uniform] == pytest.approx(expected)
    assert (found.samples, found.reduce, found.keep_ratio) == (5, reduce, 0.5)


def test_uniform_weights_are_worth_nothing():
    model = tiny_model()
    found = worth_of_weights(model, Riddles("one", 3), torch.ones(NUM_HEADS), processor=Reader(), progress=False)
    assert (found.gain, found.standard_error) == (0.0, 0.0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_standard_error_is_that_of_a_mean_of_means():
    gains = [np.array([1.0, 0.0, 0.0, 1.0]), np.array([0.5, -0.5])]
    assert _standard_error(gains) == pytest.approx(((1 / 3) / 4 + 0.5 / 2) ** 0.5 / 2)
    assert _standard_error([np.array([1.0])]) is None


def test_it_reads_as_a_sentence():
    worth = Worth(0.2, "max", 30, 0.9, 0.5, 0.375, 0.0123)
    assert str(worth) == (
        "with keep_ratio=0.2 and reduce='max', on 30 questions: weights 0.500, uniform heads 0.375, all tokens 0.900; "
        "the weights are worth +0.125 +- 0.012"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduce": "sum"}, ValueError, "reduce: expected 'mean' (paper) or 'max' over the text, got 'sum'"),
        ({"keep_ratio": 0}, ValueError, "keep_ratio: expected a float in (0, 1]"),
        ({"head_weights": torch.ones(3)}, ValueError, "head_weights: expected"),
        ({"limit": 0}, ValueError, "limit: expected"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_is_asked(options, error, message):
    task = Riddles("one", 2)
    arguments = {"head_weights": WEIGHTS, **options}
    with pytest.raises(error, match=re.escape(message)):
        worth_of_weights(tiny_model(), task, **arguments, processor=Reader(), progress=False)
    assert task.asked == []


def test_the_command(tmp_path, capsys):
    samples = TINY_MODEL / "samples"
    line = {"image": str(samples / "digits_8x8.png"), "prompt": "Which digit is red?", "answer": "8"}
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps(line) + "\n")
    command = ["weights", "worth", "tinyvqa", "--model", str(TINY_MODEL), "--data", str(data), "--reduce", "max"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["reduce"], report["samples"], report["whole"]) == ("max", 1, 1.0)
    assert report["gain"] == report["weighted"] - report["uniform"]
    assert main([*command, "--keep-ratio", "0.5"]) == 0
    assert "with keep_ratio=0.5 and reduce='max', on 1 question: weights " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--keep-ratio", "2.5"])
    assert "2.5 is out of range; give a share above 0 and up to 1.0" in capsys.readouterr().err
