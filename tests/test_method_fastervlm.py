"""FasterVLM scores the attention of CLS, and keeps the highest."""

import re

import pytest
import torch

import csrc_ref
from csrc_ref.fastervlm_scores import fastervlm_scores
from hawk_kernels import prune
from hawk_kernels.methods import FasterVLM, resolve_method
from tests.family_checks import model_of, prompts
from tests.method_checks import RAGGED, GivenView, against_its_reference, check_scores, encoder_of
from tests.tiny_families import batch
from tests.tiny_models import IMAGE, qwen_batch


@against_its_reference
def test_scores_and_kept_tokens_are_those_of_the_encoder(three_layers, budget, keep_ratio):
    attention, _, candidates = encoder_of(three_layers, qwen_batch(*RAGGED))

    def score(layer, row, places):
        return attention[row, candidates[row]]

    check_scores(three_layers, "fastervlm", budget, keep_ratio, score)


@torch.no_grad()
def test_llava_keeps_what_the_row_of_cls_says():
    name = "llava"
    tiny, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
    # the layer before the last makes the features
    attention, seen = tiny.base_model.vision_tower.encoder.layers[-2].self_attn, []
    hooks = [
        projection.register_forward_hook(lambda module, args, output: seen.append(output))
        for projection in (attention.q_proj, attention.k_proj)
    ]
    tiny(**inputs)
    for hook in hooks:
        hook.remove()
    heads = (output.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for output in seen)
    rows = torch.tensor([fastervlm_scores(*of_image, scale=attention.scale) for of_image in zip(*heads, strict=True)])
    with prune(tiny, 3, method="fastervlm", budget="per_image") as pruning:
        tiny(**inputs)
    visual = inputs["input_ids"] == IMAGE
    expected = csrc_ref.select_topk(rows, 3).mask
    assert torch.equal(pruning.keep_mask[visual].view(-1, 9), expected)
    assert torch.allclose(pruning.scores[visual].view(-1, 9), rows, atol=1e-6)


def test_ties_nan_and_one_token():
    attention = torch.tensor([[0.2, torch.nan, 0.2, 0.5], [0.3, 0.0, 0.0, 0.0]])
    view = GivenView([4, 1], attention=attention)
    assert FasterVLM().select(view, 2).mask.tolist() == [[True, False, False, True], [True, False, False, False]]
    assert FasterVLM().select(view, 3).mask[0].tolist() == [True, False, True, True]
    assert FasterVLM().select(view, 1.0).mask.tolist() == view.candidates.tolist()


def test_options_are_checked():
    expected = "cls_layer: expected a layer of the vision encoder, counted from 1, or None for that of the features"
    for wrong, error, got in ((0, ValueError, "0"), (1.5, TypeError, "float"), (True, TypeError, "bool")):
        with pytest.raises(error, match=re.escape(f"{expected}, got {got}")):
            resolve_method("fastervlm", {"cls_layer": wrong})
