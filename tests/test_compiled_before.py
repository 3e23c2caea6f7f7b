"""Code that was compiled before a `prune` block skips its hooks: it is refused, never run unpruned in silence."""

import pytest
import torch

from hawk_kernels import prune
from tests.test_prune_contract import snapshot
from tests.tiny_families import BY_NAME, batch, tiny_model
from tests.tiny_models import Picture, question, qwen_batch, qwen_vl

PRUNED = {"keep_ratio": 0.25, "head_weights": "uniform"}
INPUTS = qwen_batch(question(Picture(4, 4)))


def compiled(callable_):
    return torch.compile(callable_, backend="eager")


def tiny_llava():
    """A model that compiles faster than a Qwen, and inputs for it."""
    model = tiny_model("llava", text_changes={"num_hidden_layers": 1})
    return model, batch("llava", question(BY_NAME["llava"].picture))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def test_a_compiled_forward_is_refused_on_entering():
    model = qwen_vl(layers=1)
    for part in (model, model.model, model.model.language_model):
        part.forward = compiled(part.forward)
        with pytest.raises(ValueError, match=rf"{type(part).__name__}.forward was replaced by torch.compile"):
            prune(model, **PRUNED).__enter__()
        del part.forward
    with prune(model, **PRUNED) as pruning:
        model(**INPUTS)
    assert pruning.stats.samples[0].visual_tokens_after == 4


def test_a_compiled_model_that_ran_before_the_block_is_refused_in_the_call():
    model, inputs = tiny_llava()
    wrapper = compiled(model)
    wrapper(**inputs)
    before = snapshot(model)
    with prune(model, **PRUNED):
        with pytest.raises(ValueError, match=r"cannot run code inside prune that torch.compile made before the block"):
            wrapper(**inputs)
        kept = model(**inputs).logits
        torch.compiler.reset()
    with prune(model, **PRUNED):
        assert torch.equal(model(**inputs).logits, kept)
    assert snapshot(model) == before


def test_a_compiled_part_that_ran_before_the_block_is_refused_in_the_call():
    model, inputs = tiny_llava()
    model.model = compiled(model.model)
    model(**inputs)
    with (
        prune(model, **PRUNED),
        pytest.raises(ValueError, match=r"cannot run code inside prune that torch.compile made before the block"),
    ):
        model(**inputs)


def test_decoding_by_code_from_before_the_block_is_refused():
    model = qwen_vl(layers=1)
    token, wrapper = torch.tensor([[20]]), compiled(model)
    for _ in range(2):
        cache = model(**INPUTS, use_cache=True).past_key_values
        wrapper(input_ids=token, past_key_values=cache)
    with prune(model, **PRUNED):
        cache = model(**INPUTS, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="before the block"):
            wrapper(input_ids=token, past_key_values=cache)


def test_a_compiled_text_model_is_pruned():
    model = qwen_vl(layers=2)
    with prune(model, **PRUNED):
        expected = model(**INPUTS).logits
    model.model.language_model = compiled(model.model.language_model)
    model(**INPUTS)
    with prune(model, **PRUNED):
        assert (model(**INPUTS).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("is_used_before", [False, True])
@pytest.mark.parametrize(
    ("method", "layers"),
    [("fastv", lambda model: model.model.language_model.layers), ("hiprune", lambda model: model.model.visual.blocks)],
    ids=["fastv", "hiprune"],
)
def test_methods_that_watch_layers_refuse_compiled_ones(method, layers, is_used_before):
    model = qwen_vl(layers=3)
    for layer in layers(model):
        layer.compile(backend="eager")
    if is_used_before:
        model(**INPUTS)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"method '{method}' with compiled layers in the .* use method='hawk'"):
        prune(model, 0.25, method=method).__enter__()
    assert snapshot(model) == before
    with prune(model, **PRUNED) as pruning:
        model(**INPUTS)
    assert pruning.stats.samples[0].visual_tokens_after == 4
