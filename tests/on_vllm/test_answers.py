"""vLLM with the plugin answers as transformers and `prune` do with the same checkpoint, token by token."""

import pytest

from hawk_kernels.methods import METHODS
from hawk_kernels.selection import kept_count
from tests.on_vllm.engine import CHUNKS, SMALL_BLOCKS
from tests.on_vllm.oracle import OfEachPicture
from tests.on_vllm.questions import OF_EACH_KIND, questions

TOLERANCE = 1e-4
HAWK = {"method": "hawk", "head_weights": "tinyvqa"}


@pytest.fixture(scope="module")
def hawk_of_each_picture(expected):
    def ask(keep_ratio, of_each_kind=OF_EACH_KIND):
        return expected(keep_ratio, OfEachPicture(METHODS["hawk"]()), of_each_kind=of_each_kind, head_weights="tinyvqa")

    return ask


def prompt_tokens(answers):
    return [answer["prompt"] for answer in answers]


def test_there_are_enough_questions_and_some_have_two_pictures():
    asked = questions()
    assert len(asked) >= 150
    assert sum(len(one.pictures) == 2 for one in asked) >= 20


@pytest.fixture(scope="module")
def served_at_20(served):
    methods = ("divprune", "cdpruner")
    return dict(zip(methods, served(0.8, [{"method": name} for name in methods]), strict=True))


@pytest.mark.parametrize("method", ["divprune", "cdpruner"])
def test_a_method_that_prune_has(served_at_20, expected, count_equal, method):
    found, wanted = served_at_20[method], expected(0.2, method)
    equal, worst = count_equal(f"{method}, 20 %", found, wanted)
    assert equal == len(wanted)
    assert worst < TOLERANCE
    assert prompt_tokens(found) == prompt_tokens(wanted)


@pytest.fixture(scope="module")
def served_in_chunks(served):
    methods = ("downsample", "key_norm", "heed", "dart")
    answers = served(0.6, [{"method": name} for name in methods], **SMALL_BLOCKS, **CHUNKS)
    return dict(zip(methods, answers, strict=True))


@pytest.mark.parametrize("method", ["downsample", "key_norm", "heed", "dart"])
def test_a_method_with_small_blocks_and_chunks(served_in_chunks, expected, count_equal, method):
    found = served_in_chunks[method]
    wanted = expected(0.4, OfEachPicture(METHODS[method]()) if method == "heed" else method)
    equal, worst = count_equal(f"{method}, 40 %, 16-token chunks, prefix cache", found, wanted)
    assert equal == len(wanted)
    assert worst < TOLERANCE


def test_random_draws_the_same_tokens_of_a_single_picture(served, expected, count_equal):
    """Its draw depends on the ids of the prompt, which in vLLM has fewer placeholders of the other pictures."""
    single = [len(one.pictures) == 1 for one in questions()]
    found, wanted = served(0.6, {"method": "random", "seed": 3}), expected(0.4, "random", seed=3)
    found, wanted = (
        [answer for answer, is_single in zip(answers, single, strict=True) if is_single] for answers in (found, wanted)
    )
    equal, worst = count_equal("random, 40 %, prompts with one picture", found, wanted)
    assert equal == len(wanted)
    assert worst < TOLERANCE


def test_hawk(served, hawk_of_each_picture, count_equal):
    found, wanted = served(0.8, HAWK), hawk_of_each_picture(0.2)
    equal, worst = count_equal("hawk, 20 %", found, wanted)
    assert equal == len(wanted)
    assert worst < TOLERANCE
    assert prompt_tokens(found) == prompt_tokens(wanted)


def test_hawk_with_one_picture_is_hawk_as_prune_has_it(expected, hawk_of_each_picture):
    single = [len(one.pictures) == 1 for one in questions()]
    for own, usual, is_single in zip(
        hawk_of_each_picture(0.2), expected(0.2, "hawk", head_weights="tinyvqa"), single, strict=True
    ):
        if is_single:
            assert own == usual


def test_hawk_in_chunks_with_a_prefix_cache(served, hawk_of_each_picture, count_equal):
    twice = [list(range(7 * OF_EACH_KIND))] * 2
    found, wanted = served(0.5, HAWK, rounds=twice, **SMALL_BLOCKS, **CHUNKS), hawk_of_each_picture(0.5)
    equal, worst = count_equal("hawk, 50 %, 16-token chunks, prefix cache, asked twice", found, wanted)
    assert equal == len(wanted)
    assert worst < TOLERANCE
    assert sum(answer["cached"] for answer in found) > 0


def test_names_of_pictures_alone_would_give_wrong_answers(served, hawk_of_each_picture, count_equal):
    """The prefix cache would then answer a question from the tokens that another question kept."""
    found = served(0.5, HAWK, hash_pictures_alone=True, **SMALL_BLOCKS)
    wanted = hawk_of_each_picture(0.5)
    equal, _ = count_equal("hawk, 50 %, prefix cache by pictures alone (must differ)", found, wanted)
    assert equal < len(wanted)


def test_two_ranks_of_tensor_parallelism(served, hawk_of_each_picture, count_equal):
    found = served(0.5, HAWK, tensor_parallel_size=2, distributed_executor_backend="mp")
    wanted = hawk_of_each_picture(0.5)
    equal, worst = count_equal("hawk, 50 %, two ranks", found, wanted)
    assert equal == len(wanted)
    assert worst < TOLERANCE


def test_bfloat16_mostly_answers_as_float32(served, hawk_of_each_picture, count_equal):
    found, wanted = served(0.8, HAWK, dtype="bfloat16"), hawk_of_each_picture(0.2)
    equal, _ = count_equal("hawk, 20 %, bfloat16 beside float32", found, wanted)
    assert equal >= 0.95 * len(wanted)
    assert prompt_tokens(found) == prompt_tokens(wanted)


def test_prompts_shrink_by_what_is_dropped(served, expected):
    whole = expected(0.2, None, of_each_kind=2)
    pruned = served(0.8, {"method": "divprune"}, of_each_kind=2)
    sizes = [[picture.size[0] // 28 * (picture.size[1] // 28) for picture in one.pictures] for one in questions(2)]
    dropped = [sum(size - kept_count(0.2, size) for size in of_prompt) for of_prompt in sizes]
    assert [a - b for a, b in zip(prompt_tokens(whole), prompt_tokens(pruned), strict=True)] == dropped
