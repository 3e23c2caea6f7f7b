"""HAWK inside `prune` scores what its literal reference scores, on the model's own projections."""

import torch

import csrc_ref
from tests.method_checks import against_its_reference, check_scores


@against_its_reference
def test_scores_and_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    def score(layer, row, places):
        num_heads = layer.queries.shape[1]
        queries, keys = layer.queries[row][:, layer.text[row]], layer.keys[row][:, places]
        return csrc_ref.score_tokens(queries, keys, torch.full((num_heads,), 1 / num_heads), normalize="l2")

    check_scores(three_layers, "hawk", budget, keep_ratio, score)
