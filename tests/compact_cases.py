"""Prompts to compact, maps to merge by, and what it means that two results are the same."""

import torch

import csrc_ref
from hawk_kernels import Compacted
from hawk_kernels.selection import Merge

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def prompt(batch=2, num_tokens=37, hidden_size=24, kept=0.4, dtype=torch.float32):
    """Embeddings without a zero, so that padding cannot pass for a token."""
    embeds = torch.rand(batch, num_tokens, hidden_size).add(1).to(dtype)
    return embeds, torch.rand(batch, num_tokens) < kept


def assert_same(got, expected):
    fields = Compacted._fields[-len(got) :]
    for name, one, other in zip(fields, got, expected, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one.cpu(), other.cpu()), name


# What a sum of a few rows may differ from that in float64, relative to the sum of the magnitudes that it adds: the
# rounding of float32 sums, and that of the result to its own dtype. Triton's interpreter cuts bfloat16 off where a GPU
# rounds it.
MERGE_TOLERANCE = {torch.float32: 4e-7, torch.float16: 2**-11, torch.bfloat16: 2**-7, torch.float64: 4e-15}


def merge_map(keep_mask, num_entries=50, seed=0):
    """Entries in ascending order of random kept targets, some rows with padding; sources are any tokens."""
    generator = torch.Generator().manual_seed(seed)
    batch, num_tokens = keep_mask.shape
    source = torch.randint(num_tokens, (batch, num_entries), generator=generator)
    target = torch.randint(num_tokens, (batch, num_entries), generator=generator)
    target = torch.where(keep_mask.cpu().gather(1, target), target, -1)
    weight = torch.randn(batch, num_entries, generator=generator)
    return Merge(target, source, weight).ordered()


def assert_merged(got, embeds, keep_mask, merge, **options):
    """`got` is what the reference finds in float64, and rows without an entry are copied bit by bit."""
    wide = embeds.double()
    expected = csrc_ref.compact(wide, keep_mask, merge=merge, **options)
    weight = merge.weight.abs()
    magnitudes = csrc_ref.compact(wide.abs(), keep_mask, merge=merge._replace(weight=weight), **options).inputs_embeds
    plain = csrc_ref.compact(embeds, keep_mask, **options)
    assert_same(got[1:], plain[1:])
    assert got.inputs_embeds.dtype == embeds.dtype
    packed = got.inputs_embeds.cpu()
    assert ((packed.double() - expected[0]).abs() <= MERGE_TOLERANCE[embeds.dtype] * magnitudes + 1e-30).all()
    if not keep_mask.shape[-1]:
        return
    are_targets = torch.zeros_like(keep_mask)
    for row, places in enumerate(merge.target if merge.target.dim() == 2 else [merge.target]):
        (are_targets[row] if merge.target.dim() == 2 else are_targets)[places[places >= 0]] = True
    copied = ~torch.take_along_dim(are_targets, expected.source, -1) | (expected.attention_mask == 0)
    assert torch.equal(packed[copied], plain.inputs_embeds[copied])
