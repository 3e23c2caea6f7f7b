"""HAWK with RoPE scores what its literal reference scores, and RoPE changes what is kept."""

import pytest
import torch

from csrc_ref.hawk_rope_scores import hawk_rope_scores
from hawk_kernels import prune
from tests.method_checks import against_its_reference, check_scores
from tests.tiny_models import Picture, question, qwen_batch


@against_its_reference
def test_scores_and_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    check_scores(three_layers, "hawk_rope", budget, keep_ratio, scored_by())


@pytest.mark.parametrize("budget", ["shared", "per_image"])
def test_the_maximum_over_the_text_is_that_of_the_reference(three_layers, budget):
    score = scored_by(reduce="max", normalize="softmax")
    check_scores(three_layers, "hawk_rope", budget, 0.3, score, reduce="max")


def scored_by(**options):
    """Score a row by the reference, with uniform heads."""

    def score(layer, row, places):
        text, num_heads = layer.text[row], layer.queries.shape[1]
        return hawk_rope_scores(
            layer.queries[row][:, text],
            layer.keys[row][:, places],
            torch.full((num_heads,), 1 / num_heads),
            query_positions=layer.positions[:, row, text],
            key_positions=layer.positions[:, row, places],
            sections=[2, 3, 3],
            **options,
        )

    return score


@torch.no_grad()
def test_rope_changes_what_is_kept(three_layers):
    inputs, kept = qwen_batch(question(Picture(6, 6))), []
    for method in ("hawk", "hawk_rope"):
        with prune(three_layers, 0.3, method=method, head_weights="uniform") as pruning:
            three_layers(**inputs)
        kept.append(pruning.keep_mask)
    assert not torch.equal(*kept)
