"""VisionZip keeps and merges what its literal reference keeps and merges."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csrc_ref.visionzip_select import visionzip_select as reference
from hawk_kernels import prune
from hawk_kernels.methods import resolve_method
from hawk_kernels.methods.visionzip import visionzip_select
from hawk_kernels.recipes import RECIPES
from tests.merging_checks import check_end_to_end, matrix_of, matrix_of_reference
from tests.tiny_families import tiny_model


@pytest.mark.parametrize(("budget", "targets"), [(63, 10), (64, 10), (127, 20), (128, 20), (191, 30), (192, 30)])
def test_the_recipe_has_as_many_contextual_tokens_as_the_release(budget, targets):
    """The release keeps 54 and 10, 108 and 20, or 162 and 30 of 576 tokens; the first of each is CLS."""
    recipe = RECIPES["visionzip-release"]
    mask = torch.ones(1, 576, dtype=torch.bool)
    found = visionzip_select(torch.rand(1, 576), torch.randn(1, 576, 4), budget, mask=mask, **recipe.options)
    assert int(found.mask.sum()) == budget
    assert len(set(found.merge.target[found.merge.target >= 0].tolist())) == targets


@given(
    seed=st.integers(0, 2**20),
    num_tokens=st.integers(1, 24),
    contextual=st.sampled_from([0.0, 5 / 32, 0.3, 0.5, 0.99]),
    merging=st.sampled_from(["paper", "release"]),
    r=st.one_of(st.floats(0.01, 1.0), st.integers(1, 30)),
)
def test_the_choice_and_the_map_are_those_of_the_reference(seed, num_tokens, contextual, merging, r):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(3, num_tokens, generator=generator).mul(8).round()
    keys = torch.randn(3, num_tokens, 6, generator=generator)
    mask = torch.rand(3, num_tokens, generator=generator) < 0.8
    options = {"mask": mask, "contextual": contextual, "merging": merging}
    found, (expected, maps) = visionzip_select(attention, keys, r, **options), reference(attention, keys, r, **options)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)
    if found.merge is None:
        assert not any(maps)
    else:
        assert torch.allclose(matrix_of(found.merge, num_tokens), matrix_of_reference(maps, num_tokens))


def test_a_hand_made_case():
    """Of 8 tokens 4 are kept: 0 and 5 by attention, and 1 and 4, into which 2, 3, 6 and 7 go."""
    attention = torch.tensor([[9.0, 1, 1, 1, 1, 8, 1, 1]])
    keys = torch.tensor([[[0.0, 0], [1, 0], [2, 0.1], [0.1, 3], [0, 1], [0, 0], [1, 0], [0, 2]]])
    found = visionzip_select(attention, keys, 4, mask=torch.ones(1, 8) > 0, contextual=0.5)
    assert found.indices.tolist() == [[0, 1, 4, 5]]
    expected = torch.zeros(8, 8)
    expected[1, [1, 2, 6]] = expected[4, [3, 4, 7]] = 1 / 3
    assert torch.allclose(matrix_of(found.merge, 8)[0], expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("budget", ["shared", "per_image"])
@pytest.mark.parametrize("merging", ["paper", "release"])
def test_logits_are_those_of_the_means_that_the_model_projects(name, budget, merging):
    options = {"contextual": 0.5, "merging": merging}

    def choose(attention, keys, count):
        mask = torch.ones(attention.shape) > 0
        return reference(attention, keys.mean(dim=2), count, mask=mask, **options)

    check_end_to_end(name, "visionzip", budget, options, choose)


def test_a_published_budget_has_the_published_parts():
    for budget, contextual in ((64, 10), (128, 20), (192, 30)):
        found = visionzip_select(torch.rand(1, 576), torch.randn(1, 576, 4), budget, mask=torch.ones(1, 576) > 0)
        assert found.mask.sum() == budget
        targets = set(found.merge.target[0].tolist()) - {-1}
        assert len(targets) == contextual
        # every token is kept or goes into one
        assert (found.merge.target >= 0).sum() == 576 - budget + contextual


def test_a_family_that_interpolates_embeddings_is_refused_by_name():
    with pytest.raises(TypeError, match=r"does not merge before the projector of llava_onevision .*, got 'visionzip'"):
        prune(tiny_model("llava_onevision"), 0.5, method="visionzip")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"contextual": 1.0}, ValueError, "contextual: expected a float in [0, 1), a share of the budget, got 1.0"),
        ({"contextual": "5/32"}, TypeError, "contextual: expected a float in [0, 1), a share of the budget, got str"),
        ({"merging": "mean"}, ValueError, "merging: expected 'paper' or 'release', got 'mean'"),
        ({"rounding": "up"}, ValueError, "rounding: expected 'floor'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        resolve_method("visionzip", options)
