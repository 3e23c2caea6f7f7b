"""`pruning.totals`: sums over prompts, where `stats` knows the last one alone."""

import json
import threading

import pytest

from hawk_kernels import prune
from hawk_kernels.hf.stats import PruningTotals
from tests.tiny_models import Picture, question, qwen_batch, qwen_vl

COUNTS = (
    "visual_tokens_before",
    "visual_tokens_after",
    "prompt_tokens_before",
    "prompt_tokens_after",
)


def batches():
    """Prompts of several sizes, one of them a batch of two and one without a picture."""
    one = qwen_batch(question(Picture(4, 4)))
    two = qwen_batch(question(Picture(2, 4)), question(Picture(4, 6)))
    return [one, two, qwen_batch(question([]))]


@pytest.fixture(scope="module")
def model():
    return qwen_vl(layers=2)


@pytest.mark.parametrize("method", ["hawk", "fastv"])
def test_totals_are_the_sums_of_what_stats_told(model, method):
    options = {"head_weights": "uniform"} if method == "hawk" else {"layer": 1}
    expected = dict.fromkeys(COUNTS, 0)
    with prune(model, 0.5, method=method, **options) as pruning:
        assert pruning.totals == PruningTotals()
        for inputs in batches():
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
            for sample in pruning.stats.samples:
                expected = {name: count + getattr(sample, name) for name, count in expected.items()}
    totals = pruning.totals.to_dict()
    assert (totals.pop("prompts"), totals.pop("rows")) == (3, 4)
    assert totals.pop("choosing_seconds") > 0
    assert totals == expected
    assert totals["visual_tokens_before"] == 2 * totals["visual_tokens_after"] > 0
    json.dumps(pruning.totals.to_dict())


def test_steps_after_a_prompt_do_not_count_and_later_blocks_do(model):
    pruning, inputs = prune(model, 0.25, head_weights="uniform"), batches()[0]
    for prompts in (1, 2):
        with pruning:
            model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert pruning.totals.prompts == prompts
    seconds = pruning.totals.choosing_seconds
    with pruning:
        output = model(**inputs, use_cache=True)
        after_prompt = pruning.totals.choosing_seconds
        model(input_ids=inputs["input_ids"][:, -1:], past_key_values=output.past_key_values)
        assert pruning.totals.choosing_seconds == after_prompt > seconds


def test_threads_add_to_the_same_totals(model):
    inputs = batches()[0]
    with prune(model, 0.5, head_weights="uniform") as pruning:
        threads = [threading.Thread(target=lambda: [model(**inputs) for _ in range(4)]) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (pruning.totals.prompts, pruning.totals.rows) == (12, 12)
    assert (pruning.totals.visual_tokens_before, pruning.totals.visual_tokens_after) == (12 * 16, 12 * 8)
