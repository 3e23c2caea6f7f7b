"""TinyVQA's trained model answers questions about videos in vLLM as in transformers with `prune`."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from hawk_kernels.methods import METHODS
from tests.on_vllm.engine import CHUNKS, SMALL_BLOCKS
from tests.on_vllm.oracle import OfEachPicture
from tests.on_vllm.questions import OF_EACH_KIND, video_questions

TOLERANCE = 1e-4
HAWK = {"method": "hawk", "head_weights": "tinyvqa"}
METHODS_OF_ONE_VIDEO = ("evs", "vidcom2", "divprune")


@pytest.fixture(scope="module")
def answers_at_20(served, expected):
    """Return what vLLM and transformers answer, by method."""
    with ThreadPoolExecutor(1) as meanwhile:
        answers = meanwhile.submit(served, 0.8, [{"method": name} for name in METHODS_OF_ONE_VIDEO], videos=True)
        wanted = [expected(0.2, name, videos=True) for name in METHODS_OF_ONE_VIDEO]
    return dict(zip(METHODS_OF_ONE_VIDEO, zip(answers.result(), wanted, strict=True), strict=True))


def test_there_are_enough_questions_of_each_sort():
    asked = video_questions()
    assert len(asked) >= 150
    assert sum(len(one.videos) == 2 for one in asked) >= 10
    assert sum(bool(one.pictures) for one in asked) >= 5
    assert len({video.frames.shape for one in asked for video in one.videos}) >= 10


@pytest.mark.parametrize("method", METHODS_OF_ONE_VIDEO)
def test_a_method_that_looks_at_one_video(answers_at_20, count_equal, method):
    found, wanted = answers_at_20[method]
    equal, worst = count_equal(f"videos, {method}, 20 %", found, wanted)
    assert equal == len(wanted)
    assert worst < TOLERANCE
    assert [answer["prompt"] for answer in found] == [answer["prompt"] for answer in wanted]


def test_hawk_in_chunks_with_a_prefix_cache(served, expected, count_equal):
    twice = [list(range(7 * OF_EACH_KIND))] * 2
    with ThreadPoolExecutor(1) as meanwhile:
        answers = meanwhile.submit(served, 0.5, HAWK, videos=True, rounds=twice, **SMALL_BLOCKS, **CHUNKS)
        wanted = expected(0.5, OfEachPicture(METHODS["hawk"]()), videos=True, head_weights="tinyvqa")
    found = answers.result()
    equal, worst = count_equal("videos, hawk, 50 %, 16-token chunks, prefix cache, asked twice", found, wanted)
    assert equal == len(wanted)
    assert worst < TOLERANCE
    assert sum(answer["cached"] for answer in found) > 0


def test_methods_that_read_the_encoder(served, expected, count_equal):
    some = [{"method": "hiprune", "alpha": 1.0}, {"method": "prumerge"}, {"method": "mmtok"}]
    with ThreadPoolExecutor(1) as meanwhile:
        answers = meanwhile.submit(served, 0.8, some, videos=True)
        every = [expected(0.2, **hawk, videos=True) for hawk in some]
    for hawk, found, wanted in zip(some, answers.result(), every, strict=True):
        equal, worst = count_equal(f"videos, {hawk['method']}, 20 %", found, wanted)
        assert equal == len(wanted)
        assert worst < TOLERANCE
        assert [answer["prompt"] for answer in found] == [answer["prompt"] for answer in wanted]
