"""CDPruner keeps what its literal reference keeps."""

import re

import pytest
import torch

import csrc_ref
from csrc_ref.cdpruner_quality import cdpruner_quality
from hawk_kernels import prune
from hawk_kernels.methods import resolve_method
from tests.method_checks import FirstLayer, against_its_reference, check_choice
from tests.tiny_models import Picture, question, qwen_batch


@against_its_reference
def test_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    def choose(layer, row, places, count, frames):
        visual, text = layer.embeds[row, places], layer.embeds[row, layer.text[row]]
        masks = {"mask": torch.ones(1, len(visual)).bool(), "text_mask": torch.ones(1, len(text)).bool()}
        quality = cdpruner_quality(visual[None], text[None], **masks)
        return csrc_ref.greedy_dpp(visual, quality[0], count).mask

    check_choice(three_layers, "cdpruner", budget, keep_ratio, choose)


@torch.no_grad()
def test_negate_turns_relevance_around(three_layers):
    inputs = qwen_batch(question(Picture(5, 5)))
    kept = {}
    for negate in (False, True):
        with prune(three_layers, 1, method="cdpruner", negate=negate) as pruning:
            three_layers(**inputs)
        kept[negate] = pruning.keep_mask
    layer = FirstLayer(three_layers, inputs, pruning.query_mask)
    similarity = cdpruner_quality(layer.embeds, layer.embeds, mask=layer.visual, text_mask=layer.text).masked_fill(
        ~layer.visual, torch.nan
    )
    (best,) = (kept[False] & layer.visual)[0].nonzero().flatten().tolist()
    (worst,) = (kept[True] & layer.visual)[0].nonzero().flatten().tolist()
    assert similarity[0, best] == similarity[0][layer.visual[0]].max()
    assert similarity[0, worst] == similarity[0][layer.visual[0]].min()


def test_options_are_checked():
    with pytest.raises(TypeError, match=re.escape("negate: expected a bool, got int")):
        resolve_method("cdpruner", {"negate": 1})
