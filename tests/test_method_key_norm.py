"""Key norm scores what its literal reference scores."""

import re

import pytest
import torch

from csrc_ref.key_norm_scores import key_norm_scores
from hawk_kernels import prune
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.methods import resolve_method
from tests.family_checks import needs
from tests.method_checks import against_its_reference, check_scores
from tests.tiny_families import tiny_model
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


@pytest.mark.parametrize("family", ["llama4", "muse_glimmer"])
@pytest.mark.parametrize("keep", [0.5, {1: 0.5}], ids=["before the stack", "inside it"])
def test_keys_that_are_all_equally_long_are_refused(family, keep):
    needs(family)
    message = f"method: expected one that does not rank by the lengths of keys, since a {family} normalises its keys"
    with pytest.raises(TypeError, match=re.escape(message)):
        prune(tiny_model(family), keep, method="key_norm")


@pytest.mark.parametrize("family", ["llama4", "muse_glimmer", "qwen3_vl", "gemma3", "llava"])
@torch.no_grad()
def test_what_is_refused_is_what_ranks_by_rounding_alone(family):
    needs(family)
    model = tiny_model(family)
    projections = dissect(model).projections
    states = torch.randn(50, model.get_input_embeddings().weight.shape[1])
    lengths = projections.keys(projections.normalize(states)).norm(dim=-1)
    varies = (lengths.std(dim=0) / lengths.mean(dim=0)).max() > 1e-4
    assert bool(varies) is not projections.keys_are_equally_long
