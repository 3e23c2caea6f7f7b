"""What the model's own code would get wrong over a pruned prompt is refused in one line."""

import pytest
import torch
import transformers

from hawk_kernels import prune
from tests.family_checks import needs, prompts
from tests.tiny_families import batch, tiny_model
from tests.tiny_models import Picture, question, qwen_batch, qwen_vl

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_5_moe"])
@torch.no_grad()
def test_router_logits_over_a_mask(name, labels):
    needs(name)
    model, inputs = tiny_model(name), batch(name, *prompts(name)["padded batch"])
    more = {"labels": inputs["input_ids"]} if labels else {}
    with prune(model, 0.3, head_weights="uniform"):
        with pytest.raises(ValueError, match="output_router_logits: expected False inside prune"):
            model(**inputs, **more, output_router_logits=True)
        model(**inputs, **more)


@torch.no_grad()
def test_block_masks_of_flex_attention():
    model = tiny_model("gemma3", attention="flex_attention")
    inputs = batch("gemma3", *prompts("gemma3")["padded batch"])
    with (
        prune(model, 0.3, head_weights="uniform"),
        pytest.raises(ValueError, match=r"attention_mask: .* got a BlockMask; call model.set_attn_implementation"),
    ):
        model(**inputs)


def gradients(model, inputs):
    model.zero_grad(set_to_none=True)
    with prune(model, 0.3, method="fastv"):
        model(**inputs).logits.square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_fastv_with_gradient_checkpointing(use_reentrant):
    model, inputs = qwen_vl(layers=3).train(), qwen_batch(question(Picture(4, 4)))
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if VERSION < (5, 18):
        with pytest.raises(ValueError, match="cannot hide tokens from single layers with gradient checkpointing"):
            gradients(model, inputs)
        return
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], grad, atol=1e-6) for name, grad in expected.items())
