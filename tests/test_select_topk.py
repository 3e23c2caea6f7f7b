"""`select_topk`: what it refuses, in what it compares, and how many tokens it keeps."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_ref.select_topk import _count as reference_count
from hawk_kernels import select_topk
from hawk_kernels.selection import keep_fraction, kept_count, kept_counts

BAD_SELECTIONS = {
    "no tensor": (dict(scores=[1.0]), TypeError, "scores: expected a torch.Tensor, got list"),
    "integers": (dict(scores=torch.ones(5).long()), TypeError, r"scores: expected a floating point dtype.*\.float\(\)"),
    "dimensions": (dict(scores=torch.ones(1, 1, 5)), ValueError, r"scores: expected \[B, M\] or \[M\], got shape"),
    "mask shape": (dict(mask=torch.ones(4) > 0), ValueError, r"mask: expected shape \[5\] \(one entry a score\), got"),
    "mask dtype": (dict(mask=torch.ones(5)), TypeError, "mask: expected dtype torch.bool"),
    "r": (dict(r=6), ValueError, "at most 5 keys, got 6"),
    "rounding": (dict(rounding=None), ValueError, "rounding: expected 'floor'"),
}


@pytest.mark.parametrize("name", BAD_SELECTIONS)
def test_bad_selections_say_what_to_do(name):
    changes, error, message = BAD_SELECTIONS[name]
    with pytest.raises(error, match=message):
        select_topk(**{"scores": torch.ones(5), "r": 2} | changes)


def test_a_budget_beyond_64_bits_is_clamped_as_well():
    assert select_topk(torch.randn(1, 4), 2**63, mask=torch.ones(1, 4) > 0).mask.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_select_topk_compares_as_float32(dtype):
    scores = torch.randn(3, 20).to(dtype)
    selection = select_topk(scores, 4)
    assert selection.scores.dtype == torch.float32
    assert torch.equal(selection.mask, select_topk(scores.float(), 4).mask)


def test_a_ratio_of_any_precision_is_read_as_it_is_written():
    scores = torch.arange(10.0)
    for r, kept in ((np.float32(0.7), 7), (np.float16(0.2), 2), (np.float64(0.29), 2), (0.7, 7)):
        assert select_topk(scores, r).mask.sum() == kept
    assert select_topk(torch.arange(100.0), np.float32(0.29)).mask.sum() == 29


# A ratio that somebody wrote, one that was computed, and any other.
WRITTEN = st.builds(lambda digits, places: digits / 10**places, st.integers(1, 9999), st.just(4))
COMPUTED = st.builds(lambda part, whole: 1 - min(part, whole - 1) / whole, st.integers(0, 999), st.integers(1, 1000))
ANY = st.floats(0.0, 1.0, exclude_min=True)
ROUNDINGS = st.sampled_from(["floor", "ceil", "nearest"])


def within_reach(num_candidates, rounding):
    """Halves have twice the denominator, so rows are half as long where they count."""
    return num_candidates // 2 if rounding == "nearest" else num_candidates


@settings(max_examples=2000)
@given(r=WRITTEN | COMPUTED | ANY, num_candidates=st.integers(0, 2**25 - 1), rounding=ROUNDINGS)
def test_as_many_are_kept_as_the_reference_keeps(r, num_candidates, rounding):
    num_candidates = within_reach(num_candidates, rounding)
    expected = reference_count(r, num_candidates, rounding)
    assert kept_count(r, num_candidates, rounding) == expected
    assert kept_counts(r, torch.tensor([num_candidates]), rounding).tolist() == [expected]


@settings(max_examples=2000)
@given(data=st.data(), num_candidates=st.integers(0, 2**25 - 2), rounding=ROUNDINGS)
def test_a_share_of_exactly_so_many_keeps_as_many(data, num_candidates, rounding):
    """Beside a whole number of tokens a step of the ratio matters, however small."""
    num_candidates = within_reach(num_candidates, rounding) + 1
    count = data.draw(st.integers(1, num_candidates))
    r = count / num_candidates
    for _ in range(data.draw(st.integers(0, 4))):
        r = min(1.0, float(np.nextafter(r, data.draw(st.sampled_from([0.0, 1.0])))))
    assert kept_count(r, num_candidates, rounding) == reference_count(r, num_candidates, rounding)


def test_a_fixed_sample_of_ratios_and_lengths():
    """Every fraction of up to 60 tokens, every percentage, and ratios beside simple fractions."""
    fractions = {part / whole for whole in range(1, 61) for part in range(1, whole + 1)}
    percentages = {percent / 100 for percent in range(1, 101)} | {1 - percent / 100 for percent in range(100)}
    beside = {0.3333, 0.33333333, 0.3333333333, 0.6666666667, 0.142857142857, 1e-9, 1e-300, 5e-324, 2**-52, 1 - 2**-53}
    generator = random.Random(0)
    for r in fractions | percentages | beside:
        for num_candidates in (1, 2, 3, 7, 100, 576, 1296, 16384, *(generator.randrange(1, 2**25) for _ in range(4))):
            for rounding in ("floor", "ceil", "nearest"):
                length = within_reach(num_candidates, rounding)
                expected = reference_count(r, length, rounding)
                assert kept_count(r, length, rounding) == expected, (r, num_candidates, rounding)


@pytest.mark.parametrize(
    ("r", "num_candidates", "kept"),
    [(0.5, 5, 2), (0.5, 7, 4), (0.5, 1, 1), (0.25, 10, 2), (0.75, 10, 8), (0.1 * 3, 5, 2), (0.5 + 1e-11, 5, 3)]
    + [(0.5 - 1e-11, 7, 3), (1 / 3, 10, 3), (0.29, 50, 14), (7, 5, 5)],
)
def test_nearest_takes_halves_to_the_even_neighbour(r, num_candidates, kept):
    """As Python's `round` does, which the releases call, but for a ratio as it was written: 0.1 * 3 means 0.3."""
    assert kept_count(r, num_candidates, "nearest") == kept
    assert reference_count(r, num_candidates, "nearest") == kept
    scores = torch.arange(2.0 * num_candidates)
    assert select_topk(scores, r, mask=scores < num_candidates, rounding="nearest").mask.sum() == kept


@settings(max_examples=1000)
@given(data=st.data(), whole=st.integers(1, 2**23))
def test_beside_a_half_a_step_of_the_ratio_matters(data, whole):
    """Ratios of half a token more than a whole number of them, and their neighbours."""
    count = data.draw(st.integers(0, whole - 1))
    r = (2 * count + 1) / (2 * whole)
    for _ in range(data.draw(st.integers(0, 4))):
        r = min(1.0, float(np.nextafter(r, data.draw(st.sampled_from([0.0, 1.0])))))
    assert kept_count(r, whole, "nearest") == reference_count(r, whole, "nearest")


@settings(max_examples=500)
@given(r=WRITTEN | COMPUTED | ANY, rounding=ROUNDINGS)
def test_a_device_can_multiply_a_row_length_by_the_fraction(r, rounding):
    numerator, denominator = keep_fraction(r, rounding)
    assert 0 <= numerator <= denominator < 2**31
    assert abs(Fraction(numerator, denominator) - Fraction(r)) <= Fraction(1, 2**31 - 1)
