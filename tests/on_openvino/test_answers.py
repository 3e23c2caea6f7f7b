"""OpenVINO GenAI's own CDPruner on the shipped model, beside that of `prune`: equal answers, and right ones."""

import pytest

KEEP, DROPPED_PERCENT = 0.2, 80
IMAGE_TOKENS = (3, 4, 5)
"""Start, end and pad of a picture in TinyVQA's vocabulary."""


def all_text(input_ids):
    """Mark all tokens outside pictures: OpenVINO's relevance is to the whole prompt, template and all."""
    is_text = input_ids != IMAGE_TOKENS[0]
    for token in IMAGE_TOKENS[1:]:
        is_text &= input_ids != token
    return is_text


@pytest.fixture(scope="module")
def of_the_question(transformers):
    """Answers with the paper's CDPruner, for which the question alone is the text."""
    return transformers(keep_ratio=KEEP, method="cdpruner", rounding="nearest")


def lengths(answers):
    return [answer["prompt"] for answer in answers]


def test_unpruned(openvino, transformers, count):
    theirs, ours = openvino(), transformers()
    equal, _, right = count("nothing pruned", theirs, ours)
    assert lengths(theirs) == lengths(ours)
    assert equal == len(ours)
    assert right > 0.95 * len(ours)


def test_the_same_algorithm_gives_the_same_answers(openvino, transformers, count):
    # its relevance is the cosine with the mean embedding, where the paper has the mean of the cosines
    theirs = openvino(split=0, pruning_ratio=DROPPED_PERCENT, relevance_weight=1.0)
    ours = transformers(keep_ratio=KEEP, method="cdpruner", rounding="nearest", query=all_text)
    equal, *_ = count("20 %, weight 1, not split, beside CDPruner with the whole prompt as the text", theirs, ours)
    assert lengths(theirs) == lengths(ours)
    assert equal >= 0.97 * len(ours)


@pytest.mark.parametrize(
    ("name", "split", "settings"),
    [("weight 1, not split", 0, {"relevance_weight": 1.0}), ("its defaults", None, {})],
)
def test_beside_the_paper(openvino, of_the_question, count, name, split, settings):
    theirs = openvino(split=split, pruning_ratio=DROPPED_PERCENT, **settings)
    equal, their_right, right = count(f"20 %, {name}, beside CDPruner as in the paper", theirs, of_the_question)
    assert lengths(theirs) == lengths(of_the_question)
    # it ranks by words of the template too
    assert equal < len(theirs)
    assert right > their_right
