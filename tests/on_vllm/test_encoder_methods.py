"""Methods that read the vision encoder choose inside vLLM what they choose in transformers with `prune`."""

import pytest

from tests.on_vllm import oracle
from tests.on_vllm.checkpoint import write_qwen2_vl
from tests.on_vllm.questions import OF_EACH_KIND, questions

TOLERANCE = 1e-4
SMALL_BLOCKS = {"block_size": 32, "enable_prefix_caching": True}
CHUNKS = {"max_num_batched_tokens": 16, "enable_chunked_prefill": True}
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


def test_hiprune(served, expected, check):
    check("hiprune, 20 %", served(0.8, {"method": "hiprune"}), expected(0.2, "hiprune"))


@pytest.mark.parametrize("method", ["fastervlm", "vispruner", "holov", "visionzip", "prumerge", "mmtok"])
def test_other_methods(served, expected, check, method):
    check(f"{method}, 20 %", served(0.8, {"method": method}), expected(0.2, method))


def test_hiprune_in_chunks_with_a_prefix_cache(served, expected, check):
    """Questions about one picture share what was chosen when it was encoded."""
    twice = [list(range(7 * OF_EACH_KIND))] * 2
    found = served(0.6, {"method": "hiprune"}, rounds=twice, **SMALL_BLOCKS, **CHUNKS)
    check("hiprune, 40 %, 16-token chunks, prefix cache, asked twice", found, expected(0.4, "hiprune"))
    assert sum(answer["cached"] for answer in found) > 0


@pytest.mark.parametrize("mode", ["weights", "data"])
def test_ranks_that_share_the_heads_or_the_pictures(served, expected, check, mode):
    found = served(0.6, {"method": "hiprune"}, mm_encoder_tp_mode=mode, **TWO_RANKS)
    check(f"hiprune, 40 %, two ranks, each with a part of the {mode}", found, expected(0.4, "hiprune"))


@pytest.mark.parametrize("method", ["hiprune", "mmtok"])
def test_qwen2_vl(served, check, tmp_path, method):
    folder = write_qwen2_vl(tmp_path)
    found = served(
        0.6, {"method": method}, architecture="HawkQwen2VLForConditionalGeneration", model=folder, of_each_kind=4
    )
    wanted = oracle.answers(str(folder), questions(4), 0.4, method)
    assert len({tuple(answer["ids"]) for answer in wanted}) > 3
    check(f"Qwen2-VL of random weights, {method}, 40 %", found, wanted)
