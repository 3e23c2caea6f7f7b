"""Heed keeps what its literal reference keeps, needs no head weights, and finds what a single word asks for."""

import pytest
import torch

import csrc_ref
from csrc_ref.heed_quality import heed_quality
from hawk_kernels import prune
from hawk_kernels.methods import resolve_method
from hawk_kernels.methods.heed import contrast
from tests.method_checks import against_its_reference, check_choice
from tests.tiny_models import Picture, question, qwen_batch


@against_its_reference
def test_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    def choose(layer, row, places, count, frames):
        text, visual = layer.text[row], layer.visual[row].nonzero().flatten()
        quality = heed_quality(
            layer.queries[row][:, text],
            layer.keys[row][:, visual],
            layer.embeds[row, visual],
            layer.embeds[row, text],
            image=torch.isin(visual, places),
        )
        return csrc_ref.greedy_dpp(layer.embeds[row, places], quality, count).mask

    check_choice(three_layers, "heed", budget, keep_ratio, choose)


@torch.no_grad()
def test_a_single_token_is_the_one_of_highest_quality(three_layers):
    inputs = qwen_batch(question(Picture(5, 5)))
    with prune(three_layers, 1, method="heed") as pruning:
        three_layers(**inputs)
    assert pruning.scores.argmax() == (pruning.keep_mask & pruning.scores.isfinite()).float().argmax()
    assert pruning.stats.to_dict()["method_options"] == {"rounding": "floor"}


def test_a_cosine_counts_as_much_as_its_best_match_stands_out():
    cosines = torch.tensor([[0.7, 0.0, -0.1, 9.0], [0.05, 0.05, 0.05, 9.0], [3.0, 3.0, 3.0, 3.0]])
    candidates = torch.tensor([[True, True, True, False]] * 2 + [[False] * 4])
    torch.testing.assert_close(contrast(cosines, candidates), torch.tensor([[0.5], [0.0], [0.0]]))
    shifted = contrast(cosines + 0.3, candidates)
    torch.testing.assert_close(shifted, contrast(cosines, candidates))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_cosine_that_is_not_a_number_decides_nothing(bad):
    weight = contrast(torch.tensor([[0.1, bad, 0.3]]), torch.ones(1, 3, dtype=torch.bool))
    assert weight.tolist() == [[0.0]]


def test_options_are_checked():
    with pytest.raises(ValueError, match="rounding: expected 'floor'"):
        resolve_method("heed", {"rounding": "up"})
