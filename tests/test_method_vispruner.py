"""VisPruner keeps what its literal reference keeps."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_ref.vispruner_select import vispruner_select
from hawk_kernels import prune
from hawk_kernels.methods import VisPruner, resolve_method
from tests.family_checks import model_of, needs, prompts
from tests.method_checks import RAGGED, GivenView, against_its_reference, check_choice, encoder_of
from tests.tiny_families import batch
from tests.tiny_models import qwen_batch

RATIOS = st.integers(1, 40) | st.floats(0.05, 1.0)


@against_its_reference
def test_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    attention, features, candidates = encoder_of(three_layers, qwen_batch(*RAGGED))

    def choose(layer, row, places, count, frames):
        inside = torch.isin(layer.visual[row].nonzero().flatten(), places)
        kept = torch.zeros(len(places), dtype=torch.bool)
        of_row = attention[row, candidates[row]][inside], features[row, candidates[row]][inside]
        kept[vispruner_select(*of_row, count)] = True
        return kept

    check_choice(three_layers, "vispruner", budget, keep_ratio, choose)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=4),
    r=RATIOS,
    seed=st.integers(0, 99),
    per_image=st.booleans(),
    options=st.fixed_dictionaries(
        {"important": st.sampled_from([0, 0.25, 0.5, 1.0]), "step": st.integers(1, 9), "rounding": st.just("floor")}
    ),
)
def test_ragged_rows_keep_what_the_reference_keeps(rows, r, seed, per_image, options):
    generator = torch.Generator().manual_seed(seed)
    lengths = [sum(sizes) for sizes in rows]
    features = torch.randn(len(rows), max(lengths), 5, generator=generator)
    attention = torch.rand(len(rows), max(lengths), generator=generator)
    view = GivenView(lengths, rows if per_image else None, r, features=features, attention=attention)
    found = VisPruner(**options).select(view, r)
    for row, sizes in enumerate(rows):
        start = 0
        for size in sizes if per_image else [sum(sizes)]:
            unit = slice(start, start + size)
            expected = vispruner_select(attention[row, unit], features[row, unit], r, **options)
            assert found.mask[row, unit].nonzero().flatten().tolist() == expected
            start += size
    assert torch.equal(found.scores, attention.masked_fill(~view.candidates, -torch.inf))


def test_a_shorter_row_may_need_more_rounds_than_a_longer_one():
    lengths, r = [60, *[59] * 12], 0.05
    features, attention = torch.randn(13, 60, 4), torch.rand(13, 60)
    found = VisPruner().select(GivenView(lengths, features=features, attention=attention), r)
    for row, length in enumerate(lengths):
        expected = vispruner_select(attention[row, :length], features[row, :length], r)
        assert found.mask[row].nonzero().flatten().tolist() == expected


def test_half_is_important_and_copies_go():
    """Of two pairs of copies that nothing attends to, one of each stays."""
    features = torch.eye(6)[[0, 1, 2, 3, 2, 3]][None]
    attention = torch.tensor([[0.9, 0.8, 0.4, 0.3, 0.2, 0.1]])
    view = GivenView([6], features=features, attention=attention)
    kept = VisPruner(step=1).select(view, 4).mask[0].nonzero().flatten().tolist()
    assert kept[:2] == [0, 1]
    assert {int(features[0, token].argmax()) for token in kept[2:]} == {2, 3}


def test_tokens_that_are_not_finite_and_ties():
    attention = torch.tensor([[0.5, torch.nan, 0.5, 0.5, 0.5]])
    features = torch.ones(1, 5, 2)
    features[0, 3] = torch.nan
    view = GivenView([5], features=features, attention=attention)
    for count in range(1, 6):
        kept = VisPruner().select(view, count).mask[0].nonzero().flatten().tolist()
        assert kept == vispruner_select(attention[0], features[0], count)


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "gemma3", "qwen3_vl"])
@torch.no_grad()
def test_other_families(name):
    needs(name)
    tiny, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
    attention, features, candidates = encoder_of(tiny, inputs)
    with prune(tiny, 5, method="vispruner") as pruning:
        tiny(**inputs)
    for row in range(len(attention)):
        of_row = attention[row, candidates[row]], features[row, candidates[row]]
        scored = pruning.scores[row].isfinite()
        assert pruning.keep_mask[row, scored].nonzero().flatten().tolist() == vispruner_select(*of_row, 5)


BAD_OPTIONS = {
    "important": (1.5, ValueError, "important: expected a number in [0, 1], the share of the budget that attention"),
    "step": (0, ValueError, "step: expected an int >= 1, got 0; the release takes 8"),
    "cls_layer": (0, ValueError, "cls_layer: expected a layer of the vision encoder"),
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_options_are_checked(option):
    wrong, error, message = BAD_OPTIONS[option]
    with pytest.raises(error, match=re.escape(message)):
        resolve_method("vispruner", {option: wrong})
    with pytest.raises(TypeError, match=f"{option}: expected"):
        resolve_method("vispruner", {option: "half"})
