"""Rows of a pruned cache that the caller reorders, selects, repeats or moves to another cache object."""

import copy
import io
import weakref

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hawk_kernels import prune
from tests.family_checks import watched
from tests.method_checks import options_of
from tests.tiny_families import batch, tiny_model
from tests.tiny_models import FIRST_WORD, Picture, question, qwen_batch, qwen_vl

TOLERANCE = 1e-4
RAGGED = [
    question([Picture(3, 3), Picture(2, 4)]),
    question(Picture(2, 3), seed=3, after=2),
    question(Picture(3, 3), seed=5, after=7),
]
# each way to change rows, and the rows of the prompt that it leaves
CHANGES = {
    "reorder_cache": (torch.tensor([2, 0, 1]), [2, 0, 1]),
    "batch_select_indices": (torch.tensor([2, 0]), [2, 0]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
}
METHODS = ("hawk", "fastv")


@pytest.fixture(scope="module")
def model():
    return qwen_vl(layers=3)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pruned(model, method="hawk", keep_ratio=0.3):
    return prune(model, keep_ratio, method=method, **options_of(method))


def step(model, cache, token, **more):
    return model(input_ids=token, past_key_values=cache, use_cache=True, **more).logits[:, -1]


def tokens(rows):
    return torch.tensor([[FIRST_WORD + row] for row in rows])


def rebuilt(cache):
    """A cache from the tensors of another, as data parallelism gathers them."""
    return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])


def select(cache, rows):
    return DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in cache.layers])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_record_follows_the_rows(model, change, masked, method):
    argument, rows = CHANGES[change]
    inputs = qwen_batch(*RAGGED)
    positions = following_positions(model, inputs)
    # fastv leaves hidden tokens in the sequence, so that masks and positions are those of the unpruned model
    given = masked or method == "fastv"
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)

    def of(rows):
        return {"attention_mask": mask[rows], "position_ids": positions[..., rows, :]} if given else {}

    with pruned(model, method):
        cache = model(**inputs, use_cache=True).past_key_values
        expected = step(model, copy.deepcopy(cache), tokens(range(3)), **of([0, 1, 2]))
        getattr(cache, change)(argument)
        logits = step(model, cache, tokens(rows), **of(rows))
    assert (logits - expected[rows]).abs().max() < TOLERANCE
    assert (expected - expected.roll(1, 0)).abs().max() > 1


def following_positions(model, inputs):
    _, _, positions = watched(model, lambda: model(**inputs))
    return positions[..., -1:] + 1


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_that_was_built_anew_is_recognised(model, method):
    inputs = qwen_batch(*RAGGED)
    positions = following_positions(model, inputs)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with pruned(model, method):
        cache = model(**inputs, use_cache=True).past_key_values
        # a later prompt does not hide the earlier one
        model(**qwen_batch(question(Picture(4, 4), seed=9)), use_cache=True)
        built, fewer = rebuilt(cache), select(cache, [2, 0])
        expected = step(model, cache, tokens(range(3)), attention_mask=mask, position_ids=positions)
        for other, rows in ((built, [0, 1, 2]), (fewer, [2, 0])):
            came = step(model, other, tokens(rows), attention_mask=mask[rows], position_ids=positions[..., rows, :])
            assert (came - expected[rows]).abs().max() < TOLERANCE


def test_a_cache_of_text_from_outside_is_left_alone(model):
    text = {"input_ids": torch.tensor([[6, 20, 21, 22]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    outside, following = model(**text, use_cache=True).past_key_values, torch.full((3, 1, 1), 4)
    expected = step(model, copy.deepcopy(outside), tokens([5]), position_ids=following)
    with pruned(model):
        model(**qwen_batch(*RAGGED), use_cache=True)
        assert (step(model, outside, tokens([5]), position_ids=following) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cache_that_was_built_anew_goes_on_in_another_block_and_another_dtype(dtype):
    model = qwen_vl(layers=2)
    inputs = qwen_batch(*RAGGED)
    with pruned(model):
        cache = model(**inputs, use_cache=True).past_key_values
    other = DynamicCache([(layer.keys.to(dtype), layer.values.to(dtype)) for layer in cache.layers])
    copied = copy.deepcopy(cache)
    for layer in copied.layers:
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
    model.to(dtype)
    with pruned(model):
        assert torch.equal(step(model, other, tokens(range(3))), step(model, copied, tokens(range(3))))


def test_a_cache_that_was_cut_inside_the_stack_is_refused_in_a_block_without_such_stages(model):
    with pruned(model, "fastv"):
        cache = model(**qwen_batch(*RAGGED), use_cache=True).past_key_values
    for other in (pruned(model), prune(model, 0.3, method="fastv", mode="hide")):
        with other, pytest.raises(ValueError, match="of which another block dropped or hid tokens inside the stack"):
            step(model, cache, tokens(range(3)))
    with pruned(model, "fastv"):
        step(model, cache, tokens(range(3)))


def test_changes_in_a_row_and_copies_in_between(model):
    inputs = qwen_batch(*RAGGED)
    with pruned(model):
        cache = model(**inputs, use_cache=True).past_key_values
        expected = step(model, copy.deepcopy(cache), tokens(range(3)))
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        other = copy.deepcopy(cache)
        other.batch_select_indices(torch.tensor([0, 2]))
        other.batch_repeat_interleave(2)
        assert (step(model, cache, tokens([1, 2, 0])) - expected[[1, 2, 0]]).abs().max() < TOLERANCE
        assert (step(model, other, tokens([1, 1, 0, 0])) - expected[[1, 1, 0, 0]]).abs().max() < TOLERANCE
        saved = io.BytesIO()
        torch.save(cache, saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        assert torch.equal(step(model, loaded, tokens([1, 2, 0])), step(model, cache, tokens([1, 2, 0])))


def test_equal_rows_are_repeated(model):
    row = question(Picture(3, 3))
    inputs = qwen_batch(row, row)
    with pruned(model):
        cache = model(**inputs, use_cache=True).past_key_values
        expected = step(model, copy.deepcopy(cache), tokens([0, 1]))
        cache.batch_repeat_interleave(3)
        rows = [0, 0, 0, 1, 1, 1]
        assert (step(model, cache, tokens(rows)) - expected[rows]).abs().max() < TOLERANCE


def test_a_static_cache_is_reordered(model):
    inputs = qwen_batch(*RAGGED)
    with pruned(model):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=inputs["input_ids"].shape[1] + 4)
        model(**inputs, past_key_values=cache, use_cache=True)
        expected = step(model, copy.deepcopy(cache), tokens(range(3)))
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        assert (step(model, cache, tokens([2, 0, 1])) - expected[[2, 0, 1]]).abs().max() < TOLERANCE


def test_rows_that_change_layer_by_layer_are_refused(model):
    row = question(Picture(3, 3))
    for rows in (RAGGED, [row, row]):
        with pruned(model):
            cache = model(**qwen_batch(*rows), use_cache=True).past_key_values
            for layer in cache.layers:
                layer.batch_repeat_interleave(2)
            with pytest.raises(ValueError, match="call the cache's own batch_select_indices"):
                step(model, cache, tokens(range(2 * len(rows))))


def test_a_cache_is_freed_without_the_garbage_collector(model):
    with pruned(model):
        output = model(**qwen_batch(*RAGGED), use_cache=True)
        cache = weakref.ref(output.past_key_values)
        del output
        assert cache() is None


def test_a_cache_that_is_reset_has_its_own_methods_again(model):
    with pruned(model):
        cache = model(**qwen_batch(*RAGGED), use_cache=True).past_key_values
        assert "reorder_cache" in vars(cache)
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("in this version of transformers a growing cache that was reset stays full")
        model(input_ids=torch.tensor([[6, 20, 21, 22]]), past_key_values=cache, use_cache=True)
        assert "reorder_cache" not in vars(cache)


@pytest.mark.parametrize("name", ["lfm2_vl", "gemma3"])
def test_caches_with_other_layers(name):
    model = tiny_model(name)
    inputs = (
        batch(name, *RAGGED)
        if name == "lfm2_vl"
        else batch(name, question(Picture(1, 9)), question(Picture(1, 9), after=2))
    )
    length = len(inputs["input_ids"])
    rows = list(range(length))[::-1]
    with pruned(model):
        cache = model(**inputs, use_cache=True).past_key_values
        expected = step(model, copy.deepcopy(cache), tokens(range(length)))
        cache.reorder_cache(torch.tensor(rows))
        assert (step(model, cache, tokens(rows)) - expected[rows]).abs().max() < TOLERANCE
