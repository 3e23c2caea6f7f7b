"""Define operators in the `torch.library` of this package, and what their definitions share.

`torch.compile` sees an operator as one call of known output shapes. Operators are defined with `Library.define` and
`Library.impl`, which cost about half of what `torch.library.custom_op` costs on each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hawk_kernels.selection import Fields, keep_fraction, rounded_share

NAMESPACE = __name__.removesuffix(".ops.library").replace(".", "_")
"""The name of the package: a copy under another name (`bench.hub`) can be loaded next to it."""

LIBRARY = torch.library.Library(NAMESPACE, "DEF")

implementations: dict[str, Callable[..., Any]] = {}
"""What each operator runs, by its name, for tools that watch an operator from the inside."""


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an operator and return it.

    A schema has no unions, so `r` travels as a ratio and a budget, where a budget of 0 means that the ratio counts.

    Args:
        schema: the operator's name, arguments and results, in the language of `torch.library`.
        run: computes the results.
        fake: returns empty tensors of the results' shapes and dtypes.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    implementations[name] = run
    operator: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return operator


def fake_selection(
    like: torch.Tensor, num_keys: int, ratio: float, budget: int | torch.SymInt, rounding: str
) -> Fields:
    """Empty mask, indices and scores of `num_keys` tokens, with the rows and the device of `like`."""
    batch = like.shape[0]
    return (
        like.new_empty((batch, num_keys), dtype=torch.bool),
        like.new_empty((batch, _width(num_keys, ratio, budget, rounding)), dtype=torch.int64),
        like.new_empty((batch, num_keys), dtype=torch.float32),
    )


def _width(num_keys: int, ratio: float, budget: int | torch.SymInt, rounding: str) -> Any:
    """Kmax, which is symbolic where the number of keys or the budget is."""
    if isinstance(budget, torch.SymInt) or budget:
        return torch.sym_min(budget, num_keys)
    kept = torch.sym_max(rounded_share(num_keys, *keep_fraction(float(ratio), rounding), rounding), 1)
    return torch.sym_min(kept, num_keys)
