"""Methods that read the vision encoder choose inside vLLM what they choose in transformers with `prune`."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.on_vllm import oracle
from tests.on_vllm.checkpoint import write_qwen2_vl
from tests.on_vllm.engine import CHUNKS, SMALL_BLOCKS
from tests.on_vllm.questions import OF_EACH_KIND, questions

TOLERANCE = 1e-4
# TinyVQA's pictures keep too few tokens for an anchor at the usual alpha; HiPrune would choose what FasterVLM does
HIPRUNE = {"method": "hiprune", "alpha": 1.0}
ALL = [HIPRUNE, *({"method": name} for name in ("fastervlm", "vispruner", "holov", "visionzip", "prumerge", "mmtok"))]
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.fixture
def check(count_equal):
    """Return a function that expects equal answers, close log-probabilities and prompts of equal length."""

    def compare(what, found, wanted):
        equal, worst = count_equal(what, found, wanted)
        assert equal == len(wanted)
        assert worst < TOLERANCE
        assert [answer["prompt"] for answer in found] == [answer["prompt"] for answer in wanted]

    return compare


def test_each_method(served, expected, check):
    with ThreadPoolExecutor(1) as meanwhile:
        answers = meanwhile.submit(served, 0.8, ALL)
        wanted = [expected(0.2, **hawk) for hawk in ALL]
    for hawk, of_vllm, of_prune in zip(ALL, answers.result(), wanted, strict=True):
        check(f"{hawk['method']}, 20 %", of_vllm, of_prune)


def test_hiprune_finds_objects_in_a_middle_layer(expected):
    """Otherwise the other tests would not see whether that layer is the right one."""
    usual, of_last_layer = expected(0.2, **HIPRUNE), expected(0.2, "fastervlm")
    assert all(a["logprobs"] != b["logprobs"] for a, b in zip(usual, of_last_layer, strict=True))


def test_questions_about_a_picture_share_what_was_chosen_when_it_was_encoded(served, expected, check):
    twice = [list(range(7 * OF_EACH_KIND))] * 2
    with ThreadPoolExecutor(1) as meanwhile:
        answers = meanwhile.submit(served, 0.6, HIPRUNE, rounds=twice, **SMALL_BLOCKS, **CHUNKS)
        wanted = expected(0.4, **HIPRUNE)
    found = answers.result()
    check("hiprune, 40 %, 16-token chunks, prefix cache, asked twice", found, wanted)
    assert sum(answer["cached"] for answer in found) > 0


@pytest.mark.parametrize("shared", ["weights", "data"])
def test_ranks_that_share_the_heads_or_the_pictures_of_the_encoder(served, expected, check, shared):
    found = served(0.6, HIPRUNE, mm_encoder_tp_mode=shared, **TWO_RANKS)
    check(f"hiprune, 40 %, two ranks that share the encoder's {shared}", found, expected(0.4, **HIPRUNE))


def test_qwen2_vl(served, check, tmp_path):
    folder, of_each_kind = write_qwen2_vl(tmp_path), 4
    some = [HIPRUNE, {"method": "mmtok"}, {"method": "prumerge"}]
    architecture = "HawkQwen2VLForConditionalGeneration"
    found = served(0.6, some, architecture=architecture, model=folder, of_each_kind=of_each_kind)
    for hawk, of_vllm in zip(some, found, strict=True):
        wanted = oracle.answers(str(folder), questions(of_each_kind), 0.4, **hawk)
        assert len({tuple(answer["ids"]) for answer in wanted}) > 3
        check(f"Qwen2-VL of random weights, {hawk['method']}, 40 %", of_vllm, wanted)
