"""The random choice draws what its literal reference draws, repeats itself, and prefers no token."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csrc_ref.random_scores import random_scores as reference
from hawk_kernels import prune
from hawk_kernels.methods import resolve_method
from hawk_kernels.methods.random import random_scores
from tests.tiny_models import IMAGE, Picture, question, qwen_batch


@given(seed=st.integers(0, 2**64 - 1), key=st.integers(0, 2**32 - 1), count=st.integers(0, 40))
def test_scores_are_those_of_whole_numbers(seed, key, count):
    assert random_scores(seed, key, count).tolist() == reference(seed, key, count)


@torch.no_grad()
def test_seeds_and_questions_differ_and_repeat(three_layers):
    inputs = qwen_batch(question(Picture(6, 6)), question(Picture(6, 6), seed=1))
    kept = []
    for seed in (0, 1, 0):
        with prune(three_layers, 0.5, method="random", seed=seed) as pruning:
            three_layers(**inputs)
        kept.append(pruning.keep_mask)
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[1])
    places = (inputs["input_ids"] == IMAGE)[0]
    assert not torch.equal(kept[0][0, places], kept[0][1, places])


def test_every_token_is_as_likely():
    picked = torch.zeros(16)
    for key in range(4000):
        picked[torch.tensor(random_scores(7, key, 16)).topk(4).indices] += 1
    # 1000 expected each, standard deviation 27
    assert picked.min() > 870
    assert picked.max() < 1130


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (1.5, TypeError, "seed: expected an int, got float"),
        (True, TypeError, "seed: expected an int, got bool"),
        (-1, ValueError, "seed: expected an int in [0, 2**64), got -1"),
    ],
)
def test_options_are_checked(seed, error, message):
    with pytest.raises(error, match=re.escape(message)):
        resolve_method("random", {"seed": seed})
