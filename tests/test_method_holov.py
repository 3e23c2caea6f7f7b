"""HoloV keeps what its literal reference keeps."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_ref.holov_select import holov_select
from hawk_kernels import prune
from hawk_kernels.methods import HoloV, resolve_method
from tests.family_checks import model_of, needs, prompts
from tests.method_checks import RAGGED, GivenView, against_its_reference, check_choice, encoder_of
from tests.tiny_families import batch
from tests.tiny_models import qwen_batch

RATIOS = st.integers(1, 40) | st.floats(0.05, 1.0)


@against_its_reference
def test_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    attention, _, candidates = encoder_of(three_layers, qwen_batch(*RAGGED))

    def choose(layer, row, places, count, frames):
        inside = torch.isin(layer.visual[row].nonzero().flatten(), places)
        kept = torch.zeros(len(places), dtype=torch.bool)
        kept[holov_select(attention[row, candidates[row]][inside], layer.embeds[row, places], count)] = True
        return kept

    check_choice(three_layers, "holov", budget, keep_ratio, choose)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=3), min_size=1, max_size=3),
    r=RATIOS,
    seed=st.integers(0, 99),
    per_image=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "crops": st.sampled_from([1, 4, 16]),
            "diversity": st.sampled_from([0, 0.09, 3.0]),
            "scale": st.sampled_from(["crop", "image"]),
        }
    ),
)
def test_ragged_rows_keep_what_the_reference_keeps(rows, r, seed, per_image, options):
    generator = torch.Generator().manual_seed(seed)
    lengths = [sum(sizes) for sizes in rows]
    embeddings = torch.randn(len(rows), max(lengths), 5, generator=generator)
    # squared, so that some crops get more than they hold
    attention = torch.rand(len(rows), max(lengths), generator=generator) ** 8
    view = GivenView(lengths, rows if per_image else None, r, embeddings=embeddings, attention=attention)
    found = HoloV(**options).select(view, r)
    for row, sizes in enumerate(rows):
        start = 0
        for size in sizes if per_image else [sum(sizes)]:
            unit = slice(start, start + size)
            expected = holov_select(attention[row, unit], embeddings[row, unit], r, **options)
            assert found.mask[row, unit].nonzero().flatten().tolist() == expected
            start += size
    assert torch.equal(found.scores, attention.masked_fill(~view.candidates, -torch.inf))


def test_every_band_keeps_its_share_and_the_best_of_it():
    attention = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.1, 0.0, 0.4, 0.5]])
    view = GivenView([8], embeddings=torch.ones(1, 8, 2), attention=attention)
    # bands of 0.7, 0.3, 0.1 and 0.9 of 2.0
    kept = HoloV(crops=4).select(view, 4).mask[0].nonzero().flatten().tolist()
    assert kept == [0, 1, 6, 7]
    assert HoloV(crops=1).select(view, 4).mask[0].nonzero().flatten().tolist() == [0, 1, 6, 7]
    even = GivenView([8], embeddings=torch.ones(1, 8, 2), attention=torch.tensor([[0.1, 0.2] * 4]))
    assert HoloV(crops=4).select(even, 4).mask[0].nonzero().flatten().tolist() == [1, 3, 5, 7]


def test_diversity_counts_where_the_whole_image_sets_the_scale():
    torch.manual_seed(0)
    embeddings = torch.cat([torch.ones(1, 16, 6), torch.randn(1, 16, 6)], dim=1)
    view = GivenView([32], embeddings=embeddings, attention=torch.full((1, 32), 0.1))
    counts = {}
    for scale in ("crop", "image"):
        mask = HoloV(crops=2, diversity=1.0, scale=scale).select(view, 16).mask[0]
        counts[scale] = mask.view(2, 16).sum(dim=1).tolist()
    # equal but for rounding
    assert counts["crop"] in ([8, 8], [7, 9])
    assert counts["image"][1] > 9


def test_tokens_that_are_not_finite_come_last_and_equal_ones_in_order():
    attention = torch.tensor([[0.5, torch.nan, 0.5, 0.5, 0.5, 0.5]])
    embeddings = torch.ones(1, 6, 2)
    embeddings[0, 3] = torch.inf
    view = GivenView([6], embeddings=embeddings, attention=attention)
    for count in range(1, 7):
        kept = HoloV(crops=2).select(view, count).mask[0].nonzero().flatten().tolist()
        assert kept == holov_select(attention[0], embeddings[0], count, crops=2)
        assert len(kept) == count
    nothing = GivenView([6], embeddings=embeddings, attention=torch.zeros(1, 6))
    assert HoloV().select(nothing, 2).mask[0].sum() == 2


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "gemma3", "qwen3_vl"])
@torch.no_grad()
def test_other_families(name):
    needs(name)
    tiny, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
    attention, _, candidates = encoder_of(tiny, inputs)
    with prune(tiny, 5, method="holov", crops=4) as pruning:
        assert tiny(**inputs).logits[pruning.keep_mask].isfinite().all()
    assert torch.equal(pruning.scores[pruning.scores.isfinite()], attention[candidates])
    assert (pruning.keep_mask & pruning.scores.isfinite()).sum(dim=1).tolist() == [5] * len(attention)


BAD_OPTIONS = {
    "crops": (0, ValueError, "crops: expected an int >= 1, got 0; the release takes 16"),
    "diversity": (-1, ValueError, "diversity: expected a number >= 0, got -1; the release takes 0.09"),
    "scale": ("tile", ValueError, "scale: expected 'crop' (release) or 'image', got 'tile'; choose one"),
    "cls_layer": (0, ValueError, "cls_layer: expected a layer of the vision encoder"),
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_options_are_checked(option):
    wrong, error, message = BAD_OPTIONS[option]
    with pytest.raises(error, match=re.escape(message)):
        resolve_method("holov", {option: wrong})


def test_types_of_options_are_checked():
    for option in ("crops", "diversity"):
        with pytest.raises(TypeError, match=f"{option}: expected .*, got str"):
            resolve_method("holov", {option: "many"})
