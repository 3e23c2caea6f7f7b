"""HAWK inside `prune` scores what its literal reference scores, on the model's own projections."""

import re

import pytest
import torch

import csrc_ref
from hawk_kernels.methods import resolve_method
from tests.method_checks import against_its_reference, check_scores


@against_its_reference
def test_scores_and_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    check_scores(three_layers, "hawk", budget, keep_ratio, scored_by(csrc_ref.score_tokens, "l2"))


@pytest.mark.parametrize(
    ("options", "normalize"),
    [({}, "softmax"), ({"normalize": "l2"}, "l2"), ({"normalize": "minmax"}, "minmax"), ({"normalize": None}, None)],
    ids=str,
)
@pytest.mark.parametrize("budget", ["shared", "per_image"])
def test_the_maximum_over_the_text_is_that_of_its_reference(three_layers, budget, options, normalize):
    score = scored_by(csrc_ref.score_peaks, normalize)
    check_scores(three_layers, "hawk", budget, 0.3, score, reduce="max", **options)


def scored_by(reference, normalize):
    """Score a row by a reference, on the first layer's own projections and with uniform heads."""

    def score(layer, row, places):
        num_heads = layer.queries.shape[1]
        queries, keys = layer.queries[row][:, layer.text[row]], layer.keys[row][:, places]
        return reference(queries, keys, torch.full((num_heads,), 1 / num_heads), normalize=normalize)

    return score


@pytest.mark.parametrize("method", ["hawk", "hawk_rope"])
def test_the_norm_follows_what_the_text_is_reduced_by(method):
    """The paper's mean with the release's norm stays the default."""
    assert resolve_method(method, {}).options() == {"normalize": "l2", "rounding": "floor"}
    peaks = {"reduce": "max", "normalize": "softmax", "rounding": "floor"}
    assert resolve_method(method, {"reduce": "max"}).options() == peaks
    assert resolve_method(method, {"reduce": "max", "normalize": "l2"}).normalize == "l2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "sum"}, "reduce: expected 'mean' (paper) or 'max' over the text, got 'sum'"),
        ({"reduce": None}, "reduce: expected 'mean' (paper) or 'max' over the text, got None"),
        ({"normalize": "l1"}, "normalize: expected None, 'l2', 'softmax' or 'minmax', got 'l1'"),
    ],
    ids=str,
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_method("hawk", options)
