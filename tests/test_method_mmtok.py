"""MMTok keeps what its literal reference keeps."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_ref.mmtok_select import mmtok_select
from hawk_kernels import prune
from hawk_kernels.methods import MMTok, resolve_method
from tests.family_checks import model_of, needs, prompts
from tests.method_checks import RAGGED, GivenView, against_its_reference, check_choice, encoder_of
from tests.tiny_families import batch
from tests.tiny_models import qwen_batch

RATIOS = st.integers(1, 20) | st.floats(0.05, 1.0)


@against_its_reference
def test_kept_tokens_are_those_of_the_reference(three_layers, budget, keep_ratio):
    _, features, candidates = encoder_of(three_layers, qwen_batch(*RAGGED))

    def choose(layer, row, places, count, frames):
        inside = torch.isin(layer.visual[row].nonzero().flatten(), places)
        kept = torch.zeros(len(places), dtype=torch.bool)
        of_row = features[row, candidates[row]][inside], layer.embeds[row, layer.text[row]]
        kept[mmtok_select(layer.embeds[row, places], *of_row, count)[0]] = True
        return kept

    check_choice(three_layers, "mmtok", budget, keep_ratio, choose)


def given_rows(rows, generator, per_image=False, r=None, words=(3,)):
    lengths = [sum(sizes) for sizes in rows]
    embeddings, features = (torch.randn(len(rows), max(lengths), size, generator=generator) for size in (4, 6))
    counts = torch.tensor([words[row % len(words)] for row in range(len(rows))])
    text = torch.randn(len(rows), int(counts.max()), 4, generator=generator)
    view = GivenView(
        lengths,
        rows if per_image else None,
        r,
        embeddings=embeddings,
        features=features,
        text=(text, torch.arange(text.shape[1]) < counts[:, None]),
    )
    return view, embeddings, features, [text[row, :count] for row, count in enumerate(counts.tolist())]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 14), min_size=1, max_size=2), min_size=1, max_size=3),
    r=RATIOS,
    seed=st.integers(0, 99),
    per_image=st.booleans(),
    # soft ones, so that no gain is lost in float32
    options=st.fixed_dictionaries(
        {"alpha": st.sampled_from([0, 0.5, 2.0]), "text_temperature": st.sampled_from([0.1, 0.5])}
    ),
)
def test_ragged_rows_keep_what_the_reference_keeps(rows, r, seed, per_image, options):
    generator = torch.Generator().manual_seed(seed)
    view, embeddings, features, text = given_rows(rows, generator, per_image, r, words=(3, 1, 5))
    found = MMTok(**options).select(view, r)
    for row, sizes in enumerate(rows):
        start = 0
        for size in sizes if per_image else [sum(sizes)]:
            unit = slice(start, start + size)
            kept, gains = mmtok_select(embeddings[row, unit], features[row, unit], text[row], r, **options)
            start += size
            if options["alpha"]:
                assert found.mask[row, unit].nonzero().flatten().tolist() == kept
                assert torch.allclose(found.scores[row, unit], torch.tensor(gains).float(), atol=1e-6)
            else:
                # gains may all be 0 but for the noise of float32
                assert found.mask[row, unit].sum() == len(kept)
    assert (found.scores[~view.candidates] == -torch.inf).all()


def test_what_the_question_names_comes_first_then_what_is_not_yet_covered():
    visual = torch.eye(4)[[0, 0, 0, 1, 2]][None]
    text = torch.eye(4)[[2]][None]
    view = GivenView([5], embeddings=visual, features=visual, text=(text, torch.ones(1, 1).bool()))
    kept = [MMTok().select(view, count).mask[0].nonzero().flatten().tolist() for count in (1, 2, 3)]
    assert kept[0] == [4]
    # the three copies cover each other
    assert kept[1] in ([0, 4], [3, 4])
    assert kept[2] == [0, 3, 4]


def test_tokens_that_are_not_finite_come_last_and_copies_in_order():
    view, embeddings, features, text = given_rows([[9]], torch.Generator().manual_seed(3))
    embeddings[0, 2, 1], features[0, 5, 0] = torch.nan, torch.inf
    finite = [i for i in range(9) if i not in (2, 5)]
    for count in (1, 4, 7):
        expected, _ = mmtok_select(embeddings[0, finite], features[0, finite], text[0], count)
        kept = MMTok().select(view, count)
        assert kept.mask[0].nonzero().flatten().tolist() == [finite[i] for i in expected]
        assert kept.scores[0].isnan().nonzero().flatten().tolist() == [2, 5]
    assert MMTok().select(view, 8).mask[0].nonzero().flatten().tolist() == sorted([*finite, 2])
    same = torch.ones(1, 6, 4)
    copies = GivenView([6], embeddings=same, features=same, text=(same[:, :2], torch.ones(1, 2).bool()))
    assert MMTok().select(copies, 3).mask[0].tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "gemma3", "qwen3_vl"])
@torch.no_grad()
def test_other_families(name):
    needs(name)
    tiny, inputs = model_of(name), batch(name, *prompts(name)["padded batch"])
    with prune(tiny, 5, method="mmtok", budget="per_image") as pruning:
        assert tiny(**inputs).logits[pruning.keep_mask].isfinite().all()
    for row in range(len(inputs["input_ids"])):
        scored = pruning.scores[row].isfinite()
        assert int(pruning.keep_mask[row, scored].sum()) == 5 * len(pruning.stats.samples[row].budget_per_image)


BAD_OPTIONS = {
    "alpha": (-1, "alpha: expected a number >= 0, got -1; the paper takes 0.5"),
    "text_temperature": (0, "text_temperature: expected a number > 0, got 0; the paper takes 0.02"),
    "vision_temperature": (float("nan"), "vision_temperature: expected a number > 0, got nan; the paper takes 0.2"),
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_options_are_checked(option):
    wrong, message = BAD_OPTIONS[option]
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_method("mmtok", {option: wrong})
    with pytest.raises(TypeError, match=f"{option}: expected a number .*, got NoneType"):
        resolve_method("mmtok", {option: None})
