"""PruMerge keeps and merges what its literal reference keeps and merges."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csrc_ref.prumerge_select import prumerge_select as reference
from hawk_kernels.methods import resolve_method
from hawk_kernels.methods.prumerge import prumerge_select
from tests.merging_checks import check_end_to_end, matrix_of, matrix_of_reference


@given(
    seed=st.integers(0, 2**20),
    num_tokens=st.integers(1, 24),
    neighbours=st.sampled_from([1, 2, 5, 40]),
    plus=st.booleans(),
    merging=st.sampled_from(["paper", "release"]),
    scale=st.sampled_from([1.0, 1 / 256]),
    r=st.one_of(st.floats(0.01, 1.0), st.integers(1, 30)),
)
def test_the_choice_and_the_map_are_those_of_the_reference(seed, num_tokens, neighbours, plus, merging, scale, r):
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(3, num_tokens, generator=generator).mul(8).round().add(0.5) * scale
    keys = torch.randn(3, num_tokens, 6, generator=generator)
    mask = torch.rand(3, num_tokens, generator=generator) < 0.8
    options = {"mask": mask, "neighbours": neighbours, "plus": plus, "merging": merging}
    found, (expected, maps) = prumerge_select(attention, keys, r, **options), reference(attention, keys, r, **options)
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.scores, expected.scores)
    assert torch.allclose(matrix_of(found.merge, num_tokens), matrix_of_reference(maps, num_tokens), atol=1e-6)


def test_a_hand_made_case():
    """Tokens 1 and 4 are kept; of 0, 2, 3 the key of 3 is most like that of 1, and that of 0 most like that of 4."""
    attention = torch.tensor([[1.0, 6, 0, 2, 3]])
    keys = torch.tensor([[[0.0, 2], [1, 0], [-1, -1], [3, 1], [0, 1]]])
    found = prumerge_select(attention, keys, 2, mask=torch.ones(1, 5) > 0, neighbours=1)
    expected = torch.zeros(5, 5)
    expected[1, 1], expected[1, 3], expected[4, 4], expected[4, 0] = 0.75, 0.25, 0.75, 0.25
    assert torch.allclose(matrix_of(found.merge, 5)[0], expected)
    released = prumerge_select(attention, keys, 2, mask=torch.ones(1, 5) > 0, neighbours=1, merging="release")
    expected[1, 1], expected[1, 3], expected[4, 4], expected[4, 0] = 1, 2 / 12, 1, 1 / 12
    assert torch.allclose(matrix_of(released.merge, 5)[0], expected)


def test_the_release_adds_what_cls_attends_to_as_it_is():
    """CLS keeps a fifth of its attention for itself, so that what the patches get adds up to less than 1."""
    attention = torch.tensor([[0.1, 0.4, 0, 0.1, 0.2]])
    keys = torch.tensor([[[0.0, 2], [1, 0], [-1, -1], [3, 1], [0, 1]]])
    found = prumerge_select(attention, keys, 2, mask=torch.ones(1, 5) > 0, neighbours=1, merging="release")
    expected = torch.zeros(5, 5)
    expected[1, 1], expected[1, 3], expected[4, 4], expected[4, 0] = 1, 0.1, 1, 0.1
    assert torch.allclose(matrix_of(found.merge, 5)[0], expected)


def test_plus_spreads_three_quarters_evenly():
    attention = torch.zeros(1, 32)
    attention[0, [30, 31]] = 1.0
    found = prumerge_select(attention, torch.randn(1, 32, 4), 8, mask=torch.ones(1, 32) > 0, plus=True)
    assert found.indices.tolist() == [[0, 5, 10, 15, 20, 25, 30, 31]]


def test_a_token_without_attention_stays_as_it_is():
    found = prumerge_select(torch.zeros(1, 6), torch.randn(1, 6, 4), 2, mask=torch.ones(1, 6) > 0, neighbours=2)
    expected = torch.zeros(6, 6)
    expected[0, 0] = expected[1, 1] = 1
    assert torch.equal(matrix_of(found.merge, 6)[0], expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("budget", ["shared", "per_image"])
@pytest.mark.parametrize(
    "options", [{}, {"plus": True}, {"merging": "release", "neighbours": 3, "cls_layer": 2}], ids=str
)
def test_logits_are_those_of_the_averages_that_the_model_projects(name, budget, options):
    def choose(attention, keys, count):
        own = {option: value for option, value in options.items() if option != "cls_layer"}
        return reference(attention, keys.flatten(2), count, mask=torch.ones(attention.shape) > 0, **own)

    check_end_to_end(name, "prumerge", budget, options, choose)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"neighbours": 0}, ValueError, "neighbours: expected an int >= 1, got 0"),
        ({"plus": 1}, TypeError, "plus: expected a bool, got int"),
        ({"merging": None}, ValueError, "merging: expected 'paper' or 'release', got None"),
        ({"cls_layer": 0}, ValueError, "cls_layer: expected a layer of the vision encoder, counted from 1"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        resolve_method("prumerge", options)
