"""Prompts to compact, and what it means that two results are the same."""

import torch

from hawk_kernels import Compacted

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def prompt(batch=2, num_tokens=37, hidden_size=24, kept=0.4, dtype=torch.float32):
    """Embeddings without a zero, so that padding cannot pass for a token."""
    embeds = torch.rand(batch, num_tokens, hidden_size).add(1).to(dtype)
    return embeds, torch.rand(batch, num_tokens) < kept


def assert_same(got, expected):
    for name, one, other in zip(Compacted._fields, got, expected, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one.cpu(), other.cpu()), name
