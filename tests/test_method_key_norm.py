"""Key norm scores what its literal reference scores."""

import re

import pytest
import torch

from csrc_ref.key_norm_scores import key_norm_scores
from hawk_kernels import prune
from hawk_kernels.methods import resolve_method
from tests.method_checks import against_its_reference, check_scores
from tests.tiny_models import IMAGE, Picture, question, qwen_batch


@against_its_reference
def test_scores_and_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    def score(layer, row, places):
        return torch.tensor(key_norm_scores(layer.keys[row][:, places]))

    check_scores(three_layers, "key_norm", budget, keep_ratio, score)


@torch.no_grad()
def test_it_keeps_the_shortest_or_the_longest(three_layers):
    inputs = qwen_batch(question(Picture(5, 5)))
    visual, kept = inputs["input_ids"] == IMAGE, {}
    for keep in ("shortest", "longest"):
        with prune(three_layers, 12, method="key_norm", keep=keep) as pruning:
            three_layers(**inputs)
        kept[keep] = pruning.keep_mask & visual
    assert (kept["shortest"] & kept["longest"]).sum() == 0
    assert (kept["shortest"] | kept["longest"]).sum() == 24


def test_options_are_checked():
    message = "keep: expected 'longest' or 'shortest' (arXiv 2406.11430), got 'long'"
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_method("key_norm", {"keep": "long"})
