"""The reference against numbers worked by hand: everything else is measured against the reference."""

import inspect

import pytest
import torch

import csrc_ref
import hawk_kernels
from tests.test_operators import OPERATORS

# Two heads of one dimension, two queries each: their means are 2 and 1. Keys 3, -1, 0.
Q = torch.tensor([[[1.0], [3.0]], [[0.0], [2.0]]])
K = torch.tensor([[[3.0], [-1.0], [0.0]]])
W = torch.tensor([0.75, 0.25])
# c is [[6, -2, 0], [3, -1, 0]].


def test_the_paper_without_norm():
    scores = csrc_ref.score_tokens(Q, K, W)
    assert scores.tolist() == [0.75 * 6 + 0.25 * 3, 0.75 * -2 + 0.25 * -1, 0.0]


def test_l2_divides_each_head_by_its_length():
    scores = csrc_ref.score_tokens(Q.double(), K.double(), W.double(), normalize="l2")
    expected = [3 / 10**0.5, -1 / 10**0.5, 0.0]  # both heads point the same way
    assert scores.tolist() == pytest.approx(expected, rel=1e-12)


def test_minmax_maps_each_head_to_zero_and_one():
    scores = csrc_ref.score_tokens(Q.double(), K.double(), W.double(), normalize="minmax")
    assert scores.tolist() == pytest.approx([1.0, 0.0, 0.25], rel=1e-12)


def test_softmax_sums_to_the_weights():
    scores = csrc_ref.score_tokens(Q.double(), K.double(), W.double(), normalize="softmax")
    first = torch.tensor([6.0, -2.0, 0.0]).double().exp()
    second = torch.tensor([3.0, -1.0, 0.0]).double().exp()
    expected = 0.75 * first / first.sum() + 0.25 * second / second.sum()
    assert scores.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert scores.sum().item() == pytest.approx(1.0)


def test_scale_defaults_to_the_root_of_head_dim():
    q, k = torch.ones(1, 1, 4), torch.ones(1, 1, 4)
    assert csrc_ref.score_tokens(q, k, torch.ones(1)).item() == 2.0
    assert csrc_ref.score_tokens(q, k, torch.ones(1), scale=1.0).item() == 4.0


def test_non_finite_logits_count_as_zero():
    k = torch.tensor([[[torch.inf], [-1.0], [torch.nan]]])
    assert csrc_ref.score_tokens(Q, k, W).tolist() == [0.0, -1.75, 0.0]


def test_heads_share_key_value_heads_in_order():
    q = torch.ones(4, 1, 1)
    k = torch.tensor([[[1.0]], [[10.0]]])
    w = torch.tensor([1.0, 2.0, 4.0, 8.0])
    assert csrc_ref.score_tokens(q, k, w).item() == (1 + 2) * 1 + (4 + 8) * 10


@pytest.mark.parametrize(
    ("r", "num_keys", "rounding", "expected"),
    [
        (0.29, 100, "floor", 29),
        (0.29, 100, "ceil", 29),
        (0.07, 100, "ceil", 7),
        (0.2, 1296, "floor", 259),
        (0.2, 1296, "ceil", 260),
        (1 / 3, 576, "floor", 192),
        (1 - 0.8, 100, "floor", 20),
        (0.1 * 3, 10, "ceil", 3),
        (0.01, 5, "floor", 1),
        (1.0, 7, "floor", 7),
        (3, 7, "ceil", 3),
    ],
)
def test_how_many_are_kept(r, num_keys, rounding, expected):
    selection = csrc_ref.select_topk(torch.randn(num_keys), r, rounding=rounding)
    assert selection.mask.sum() == expected
    assert selection.indices.shape == (expected,)


def test_order_of_ties_signed_zero_and_nan():
    scores = torch.tensor([torch.nan, -0.0, 1.0, 0.0, -torch.inf, 1.0])
    order = [2, 5, 1, 3, 4, 0]
    for count in range(1, 7):
        assert csrc_ref.select_topk(scores, count).indices.tolist() == sorted(order[:count])


def test_ragged_rows_are_padded_with_minus_one():
    mask = torch.tensor([[True, True, True, True], [False, True, False, False], [False] * 4])
    selection = csrc_ref.select_topk(torch.tensor([[4.0, 3, 2, 1]] * 3), 0.5, mask=mask)
    assert selection.indices.tolist() == [[0, 1], [1, -1], [-1, -1]]
    assert selection.scores[1].tolist() == [-torch.inf, 3.0, -torch.inf, -torch.inf]


@pytest.mark.parametrize("name", OPERATORS)
def test_reference_and_package_have_the_same_signatures(name):
    def signature(module):
        return [(p.name, p.default, p.kind) for p in inspect.signature(getattr(module, name)).parameters.values()]

    assert signature(csrc_ref) == signature(hawk_kernels)


def test_the_reference_imports_nothing_of_the_package(repository):
    for source in (repository / "csrc_ref").glob("*.py"):
        assert "import hawk_kernels" not in source.read_text()
        assert "from hawk_kernels" not in source.read_text()
