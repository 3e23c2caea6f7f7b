"""The life of a `prune` block: what it says on leaving, and calls, caches and threads that outlive it."""

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch

from hawk_kernels import prune
from tests.test_prune_contract import GREEDY, snapshot
from tests.tiny_models import Picture, question, qwen_batch, qwen_vl

PRUNED = {"keep_ratio": 0.25, "head_weights": "uniform"}


@pytest.fixture
def model():
    return qwen_vl(layers=2)


@pytest.fixture
def inputs():
    return qwen_batch(question(Picture(4, 4)))


class Gate:
    """A stopping criterion or streamer that halts a generation in its second step until it is told to go on."""

    def __init__(self):
        self.is_reached, self.may_go_on = threading.Event(), threading.Event()
        self._steps = 0

    def put(self, value):
        self._steps += 1
        if self._steps == 2:
            self.is_reached.set()
            assert self.may_go_on.wait(60)

    def end(self):
        pass


def in_thread(call, **kwargs):
    """Start `call` in a thread; returns the thread and the list that gets its result or its error."""
    results = []

    def run():
        try:
            results.append(call(**kwargs))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def forgetful_generate(model, inputs):
    with prune(model, **PRUNED) as pruning:
        pass
    model.generate(**inputs, **GREEDY)
    return pruning


def test_a_block_that_saw_no_call_says_so_on_leaving(model, inputs):
    with pytest.warns(UserWarning, match="was not called inside the block, so nothing was pruned; put") as said:
        pruning = forgetful_generate(model, inputs)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert pruning.keep_mask is None


def test_a_block_that_was_used_or_left_by_an_exception_says_nothing(model, inputs):
    def fail():
        with prune(model, **PRUNED):
            raise RuntimeError("from inside")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="from inside"):
            fail()
        with prune(model, **PRUNED):
            model.generate(**inputs, **GREEDY)
        with prune(model, **PRUNED):
            model.generate(**qwen_batch([6, 20, 21, 22]), **GREEDY)
        with torch.no_grad():
            with prune(model, **PRUNED):
                cache = model(**inputs, use_cache=True).past_key_values
            with prune(model, **PRUNED):
                model(input_ids=torch.tensor([[20]]), past_key_values=cache)


def test_images_that_all_came_over_a_filled_cache_are_reported_on_leaving(model, inputs):
    later = qwen_batch(question(Picture(2, 3), seed=3), seed=1)
    length = inputs["input_ids"].shape[1] + later["input_ids"].shape[1]
    later["attention_mask"] = torch.ones(1, length, dtype=torch.long)
    later["position_ids"] = (500 + torch.arange(later["input_ids"].shape[1])).expand(3, 1, -1)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        said = pytest.warns(UserWarning, match="none was pruned, since they came over a cache that was not empty")
        with said, prune(model, **PRUNED):
            model(**later, past_key_values=cache)


def test_a_generation_that_outlives_its_block_is_pruned_to_its_end(model, inputs):
    before = snapshot(model)
    plain = model.generate(**inputs, **GREEDY)
    with prune(model, **PRUNED):
        expected = model.generate(**inputs, **GREEDY)
    assert not torch.equal(plain, expected)
    gate = Gate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with prune(model, **PRUNED) as pruning:
            thread, results = in_thread(model.generate, **inputs, **GREEDY, streamer=gate)
            assert gate.is_reached.wait(60)
    # meanwhile other threads see the whole model, and no other block can begin
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    with pytest.raises(ValueError, match=r"being pruned already; .* join the threads that generate in it"):
        prune(model, **PRUNED).__enter__()
    gate.may_go_on.set()
    thread.join()
    assert torch.equal(results[0], expected)
    assert pruning.stats.samples[0].visual_tokens_after == 4
    assert snapshot(model) == before


def test_a_generation_that_fails_after_its_block_leaves_nothing(model, inputs):
    before = snapshot(model)
    gate = Gate()
    gate.end = lambda: 1 / 0
    with prune(model, **PRUNED):
        thread, results = in_thread(model.generate, **inputs, **GREEDY, streamer=gate)
        assert gate.is_reached.wait(60)
    assert snapshot(model) != before
    gate.may_go_on.set()
    thread.join()
    assert isinstance(results[0], ZeroDivisionError)
    assert snapshot(model) == before


@pytest.mark.filterwarnings("ignore:prune. the model was not called")
def test_a_thread_that_starts_late_with_the_generate_of_the_block_is_pruned(model, inputs):
    before = snapshot(model)
    with prune(model, **PRUNED):
        expected = model.generate(**inputs, **GREEDY)
    with prune(model, **PRUNED):
        generate = model.generate
    assert snapshot(model) == before
    thread, results = in_thread(generate, **inputs, **GREEDY)
    thread.join()
    assert torch.equal(results[0], expected)
    with pytest.raises(ValueError, match="taken from the model inside prune after leaving the block"):
        generate(**inputs, **GREEDY)
    assert snapshot(model) == before


def test_a_plain_call_that_outlives_its_block_is_pruned_to_its_end(model, inputs):
    before = snapshot(model)
    is_inside, may_go_on = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            is_inside.set()
            assert may_go_on.wait(60)

    with torch.no_grad(), prune(model, **PRUNED):
        expected = model(**inputs).logits
    hook = model.model.visual.register_forward_pre_hook(wait)
    with prune(model, **PRUNED):
        thread, results = in_thread(torch.no_grad()(model), **inputs)
        assert is_inside.wait(60)
    may_go_on.set()
    thread.join()
    hook.remove()
    assert torch.equal(results[0].logits, expected)
    assert snapshot(model) == before


@pytest.mark.parametrize("change", ["delete", "replace", "wrap"])
def test_leaving_cleans_up_whatever_happened_to_generate(model, inputs, change):
    before = snapshot(model)
    with prune(model, **PRUNED):
        expected = model.generate(**inputs, **GREEDY)
        if change == "delete":
            del model.generate
        elif change == "replace":
            model.generate = lambda **kwargs: "mine"
        else:
            model.generate = lambda inner=model.generate, **kwargs: inner(**kwargs)
        if change != "replace":
            assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    if change == "replace":
        assert model.generate() == "mine"
    elif change == "wrap":
        with pytest.raises(ValueError, match=r"after `del model\.generate` if you have set it yourself"):
            model.generate(**inputs, **GREEDY)
    vars(model).pop("generate", None)
    assert snapshot(model) == before


def test_an_adapter_that_was_added_before_the_block_ranks(model, inputs):
    """What `prune` reads of the model it reads on entering."""
    pruning = prune(model, **PRUNED)
    attention = model.model.language_model.layers[0].self_attn
    attention.q_proj = torch.nn.Linear(64, 64)
    with torch.no_grad():
        with prune(model, **PRUNED) as expected:
            model(**inputs)
        with pruning:
            model(**inputs)
    assert torch.equal(pruning.scores, expected.scores)


@pytest.mark.parametrize("method", [{}, {"method": "fastv", "layer": 1}], ids=["hawk", "fastv"])
def test_a_pruned_cache_goes_on_inside_a_block_only(model, inputs, method):
    options = {"keep_ratio": 0.25, **(method or PRUNED)}
    token = torch.tensor([[20]])
    with torch.no_grad():
        with prune(model, **options):
            cache = model(**inputs, use_cache=True).past_key_values
            caches = [cache, copy.deepcopy(cache)]
            expected = model(input_ids=token, past_key_values=copy.deepcopy(cache)).logits
        for each in caches:
            with pytest.raises(ValueError, match="cannot continue a pruned cache outside prune"):
                model(input_ids=token, past_key_values=each)
            with pytest.raises(ValueError, match="cannot continue a pruned cache outside prune"):
                model.generate(input_ids=torch.cat([inputs["input_ids"], token], dim=1), past_key_values=each, **GREEDY)
            # reading goes on, and so does the same cache in a later block
            assert each.get_seq_length() > 0
            with prune(model, **options):
                assert torch.equal(model(input_ids=token, past_key_values=each).logits, expected)


def test_a_pruned_cache_is_saved_with_its_guard(model, inputs, tmp_path):
    token = torch.tensor([[20]])
    with torch.no_grad():
        with prune(model, **PRUNED):
            cache = model(**inputs, use_cache=True).past_key_values
            torch.save(cache, tmp_path / "cache.pt")
            expected = model(input_ids=token, past_key_values=cache).logits
        again = torch.load(tmp_path / "cache.pt", weights_only=False)
        assert isinstance(again, type(cache).__mro__[2])
        with pytest.raises(ValueError, match="cannot continue a pruned cache"):
            model(input_ids=token, past_key_values=again)
        with prune(model, **PRUNED):
            assert torch.equal(model(input_ids=token, past_key_values=again).logits, expected)


@pytest.mark.parametrize("kind", ["growing", "static"])
def test_a_cache_that_was_reset_is_an_ordinary_one(model, inputs, kind):
    from transformers import DynamicCache, StaticCache

    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if kind == "growing" else StaticCache(config=config, max_cache_len=64)
    plain = type(cache)
    with torch.no_grad():
        expected = model(**inputs).logits
        with prune(model, **PRUNED):
            model(**inputs, past_key_values=cache)
        if kind == "static":
            cache.reset()
        else:
            cache.crop(-cache.get_seq_length())
        assert (model(**inputs, past_key_values=cache).logits - expected).abs().max() < 1e-5
    assert type(cache) is plain


def test_a_pruned_cache_is_freed_when_nobody_holds_it(model, inputs):
    with torch.no_grad(), prune(model, **PRUNED):
        cache = model(**inputs, use_cache=True).past_key_values
        gc.disable()
        try:
            held = weakref.ref(cache.layers[0].keys)
            del cache
            assert held() is None
        finally:
            gc.enable()


def test_a_cache_that_nothing_was_dropped_from_goes_on_anywhere(model, inputs):
    token = torch.tensor([[20]])
    with torch.no_grad():
        expected = model(input_ids=token, past_key_values=model(**inputs, use_cache=True).past_key_values).logits
        with prune(model, 1.0, head_weights="uniform"):
            cache = model(**inputs, use_cache=True).past_key_values
        assert torch.equal(model(input_ids=token, past_key_values=cache).logits, expected)
