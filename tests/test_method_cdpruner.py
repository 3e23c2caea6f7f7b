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
    check_choice(three_layers, "cdpruner", budget, keep_ratio, chosen_by())


@pytest.mark.parametrize("budget", ["shared", "per_image"])
@pytest.mark.parametrize(
    "options",
    [{"text": "max"}, {"theta": 0.5}, {"theta": 0}, {"theta": 0.9, "text": "max"}, {"scale_over": "prompt"}],
    ids=str,
)
def test_options_choose_as_in_the_reference(three_layers, budget, options):
    check_choice(three_layers, "cdpruner", budget, 0.3, chosen_by(**options), **options)


def chosen_by(scale_over="budget", **options):
    """Choose the tokens of an image by the reference; `scale_over="prompt"` scales over its row."""

    def choose(layer, row, places, count, frames):
        text, visual = layer.embeds[row, layer.text[row]], layer.visual[row].nonzero().flatten()
        scaled = visual if scale_over == "prompt" else places
        masks = {"mask": torch.ones(1, len(scaled)).bool(), "text_mask": torch.ones(1, len(text)).bool()}
        quality = cdpruner_quality(layer.embeds[row, scaled][None], text[None], **masks, **options)[0]
        return csrc_ref.greedy_dpp(layer.embeds[row, places], quality[torch.isin(scaled, places)], count).mask

    return choose


@torch.no_grad()
def test_however_large_theta_is_nothing_overflows(three_layers):
    """Close to 1 relevance alone decides: the single token that stays is the most relevant one."""
    inputs, kept = qwen_batch(question(Picture(5, 5))), []
    for options in ({"theta": 0.9999999}, {}):
        with prune(three_layers, 1, method="cdpruner", **options) as pruning:
            three_layers(**inputs)
        kept.append(pruning.keep_mask)
    assert torch.equal(*kept)


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"negate": 1}, TypeError, "negate: expected a bool, got int"),
        ({"text": "sum"}, ValueError, "text: expected 'mean' (paper) or 'max' over the text, got 'sum'"),
        ({"theta": "0.5"}, TypeError, "theta: expected None or a number in [0, 1), got str; 0 looks at diversity"),
        ({"theta": True}, TypeError, "theta: expected None or a number in [0, 1), got bool"),
        ({"theta": 1}, ValueError, "theta: expected None or a number in [0, 1), got 1; 0 looks at diversity alone"),
        ({"theta": -0.1}, ValueError, "theta: expected None or a number in [0, 1), got -0.1"),
        ({"theta": float("nan")}, ValueError, "theta: expected None or a number in [0, 1), got nan"),
        ({"scale_over": "row"}, ValueError, "scale_over: expected 'budget' or 'prompt', got 'row'"),
    ],
    ids=str,
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        resolve_method("cdpruner", options)
