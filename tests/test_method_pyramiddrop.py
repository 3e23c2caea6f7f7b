"""PyramidDrop keeps what its literal reference keeps at each stage, by the attention that the model itself computes."""

import re

import pytest
import torch

from csrc_ref.pyramiddrop_stages import pyramiddrop_stages
from hawk_kernels import prune
from hawk_kernels.methods import PyramidDrop, resolve_method
from tests.method_checks import RAGGED, visual_tokens
from tests.tiny_models import qwen_batch, qwen_vl


@pytest.fixture(scope="module")
def model():
    return qwen_vl(layers=8, attention="eager")


@pytest.mark.parametrize("ratio", [0.125, 0.3])
@torch.no_grad()
def test_each_stage_keeps_what_the_reference_keeps(model, ratio):
    inputs = qwen_batch(*RAGGED)
    visual, ratios = visual_tokens(inputs), [ratio ** (1 / 3), ratio ** (2 / 3), ratio]
    stages = {2: ratios[0], 4: ratios[1], 6: ratios[2]}
    attention, kept = [], []
    for number, layer in enumerate(stages):
        # the stages before this one, so that the layer after it sees what it chooses from
        before = dict(list(stages.items())[:number]) or {1: 1.0}
        with prune(model, before, method="pyramiddrop", mode="hide"):
            attention.append(model(**inputs, output_attentions=True).attentions[layer][:, :, -1].mean(dim=1))
        with prune(model, {**before, layer: stages[layer]}, method="pyramiddrop") as pruning:
            model(**inputs)
        kept.append(pruning.keep_mask & visual)
    for row in range(len(visual)):
        if visual[row].any():
            expected = pyramiddrop_stages([of_stage[row] for of_stage in attention], visual[row], ratios)
            assert all(torch.equal(found[row], stage) for found, stage in zip(kept, expected, strict=True))
    with prune(model, ratio, method="pyramiddrop") as pruning:
        model(**inputs)
    assert torch.equal(pruning.keep_mask & visual, kept[-1])
    assert torch.allclose(pruning.scores[kept[-1]], attention[-1][kept[-1]], atol=1e-6)


@torch.no_grad()
def test_a_budget_is_reached_in_equal_ratios(model):
    with prune(model, 2, method="pyramiddrop") as pruning:
        model(**qwen_batch(*RAGGED))
    # 26 (2 / 26) ** (1 / 3) = 11.05, and 26 (2 / 26) ** (2 / 3) = 4.70
    assert pruning.stats.samples[3].visual_tokens_by_layer == (26, 26, 11, 11, 4, 4, 2, 2)
    assert "after layer 2: pyramiddrop drops all but 0.33 of the way to 2" in repr(pruning.stats)


def test_its_stages_are_those_of_the_release():
    assert PyramidDrop().stages(0.125, 32) == pytest.approx({8: 0.5, 16: 0.25, 24: 0.125})
    assert list(PyramidDrop().stages(0.5, 28)) == [7, 14, 21]
    # in a model of few layers stages fall together
    assert PyramidDrop().stages(0.5, 2) == {1: 0.5}


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match=re.escape("rounding: expected 'floor' (paper) or 'ceil' (release), got 'up'")):
        resolve_method("pyramiddrop", {"rounding": "up"})
    with pytest.raises(ValueError, match="method: expected one for a text model of 1 layers, got 'pyramiddrop'"):
        prune(qwen_vl(layers=1), 0.3, method="pyramiddrop")
    with pytest.raises(
        TypeError, match="expected one that can choose before the first layer for stage 0, got 'pyramid"
    ):
        prune(qwen_vl(layers=2), {0: 0.3}, method="pyramiddrop")
