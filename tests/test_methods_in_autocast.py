"""Inside autocast, which computes products in half precision, methods score in float32 all the same."""

import pytest
import torch

from hawk_kernels import prune
from hawk_kernels.methods import METHODS
from hawk_kernels.methods.base import product
from tests.family_checks import example
from tests.method_checks import options_of

INSIDE_THE_STACK = ("dart", "cdpruner", "divprune", "heed", "key_norm", "hawk", "fastv", "sparsevlm")


def check(pruning, model, inputs):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pruning:
        logits = model(**inputs).logits
    assert logits[pruning.keep_mask].isfinite().all()
    assert pruning.scores.dtype == torch.float32


@pytest.mark.parametrize("budget", ["shared", "per_image"])
@pytest.mark.parametrize("method", METHODS)
def test_before_the_first_layer(method, budget):
    model, inputs = example("llava", "padded batch")
    check(prune(model, 0.4, method=method, budget=budget, **options_of(method)), model, inputs)


@pytest.mark.parametrize("method", INSIDE_THE_STACK)
def test_inside_the_stack(method):
    model, inputs = example("llava", "padded batch")
    check(prune(model, {1: 0.6, 2: 0.3}, method=method, **options_of(method)), model, inputs)


def test_products_are_those_outside():
    one, other = torch.randn(2, 5, 7), torch.randn(2, 7, 3)
    expected = one @ other
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(one, other), expected)
        assert not torch.equal((one @ other).float(), expected)
