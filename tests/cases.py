"""Inputs and tolerances that the tests of the core share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

import csrc_ref

NORMALIZATIONS = (None, "l2", "softmax", "minmax")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Scores are accumulated in float32 whatever the input dtype, and half-precision inputs are exact in float32, so the
# error against float64 is that of a few hundred float32 additions relative to the largest score, for every dtype.
SCORE_TOLERANCE = {torch.float32: 4e-6, torch.float16: 4e-6, torch.bfloat16: 4e-6}


@dataclass
class Case:
    """The arguments of `score_and_select`."""

    q: torch.Tensor
    k: torch.Tensor
    w: torch.Tensor
    r: float | int = 0.3
    options: dict = field(default_factory=dict)

    def to(self, device: torch.device) -> Case:
        options = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in self.options.items()
        }
        return Case(self.q.to(device), self.k.to(device), self.w.to(device), self.r, options)


def make_case(
    batch: int = 2,
    num_heads: int = 6,
    num_key_value_heads: int = 2,
    num_queries: int = 5,
    num_keys: int = 37,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    r: float | int = 0.3,
    masked: bool = False,
    seed: int = 0,
    **options: object,
) -> Case:
    """Make random inputs; masked ones have NaN wherever a mask is False."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, num_heads, num_queries, head_dim, generator=generator).to(dtype)
    k = torch.randn(batch, num_key_value_heads, num_keys, head_dim, generator=generator).to(dtype)
    w = torch.rand(num_heads, generator=generator)
    if masked:
        q_mask = torch.rand(batch, num_queries, generator=generator) < 0.6
        k_mask = torch.rand(batch, num_keys, generator=generator) < 0.6
        q_mask[:, :1] = True
        q = q.masked_fill(~q_mask[:, None, :, None], torch.nan)
        k = k.masked_fill(~k_mask[:, None, :, None], torch.nan)
        options |= {"q_mask": q_mask, "k_mask": k_mask}
    return Case(q, k, w, r, options)


def assert_matches_reference(case: Case, selection) -> None:
    """Scores agree with float64; the selection is the stable sort of the scores that were returned, to the letter."""
    options = dict(case.options)
    rounding = options.pop("rounding", "floor")
    options.pop("backend", None)
    mask, indices, scores = (tensor.cpu() for tensor in selection)
    expected = csrc_ref.score_tokens(case.q.double(), case.k.double(), case.w.double(), **options)
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(scores), finite)
    if finite.any():
        largest = expected[finite].abs().max().clamp(min=1e-30)
        error = ((scores.double() - expected)[finite].abs().max() / largest).item()
        assert error <= SCORE_TOLERANCE[case.q.dtype], f"relative error {error:.2e}"
    exact = csrc_ref.select_topk(scores, case.r, mask=options.get("k_mask"), rounding=rounding)
    assert torch.equal(mask, exact.mask)
    assert torch.equal(indices, exact.indices)
    assert scores.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert indices.dtype == torch.int64
