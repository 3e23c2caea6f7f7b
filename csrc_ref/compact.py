"""Building the pruned prompt: the tokens that stay, row by row, each row filled up at its left."""

from typing import NamedTuple

import torch


class Compacted(NamedTuple):
    inputs_embeds: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    source: torch.Tensor


def compact(inputs_embeds, keep_mask, *, position_ids=None, length=None, merge=None, backend=None):
    """Kept tokens in their order at the end of rows of `length` tokens; zeros in front of them.

    Args:
        inputs_embeds: `[B, T, C]` or `[T, C]`.
        keep_mask: bool `[B, T]` or `[T]`, True = stays.
        position_ids: `[B or 1, T]` or `[A, B or 1, T]`, without the B for unbatched input; default: 0 to T - 1.
        length: tokens of a packed row, `T'`; default: as many as the fullest row keeps.
        merge: targets, sources and weights `[B, E]` or `[E]`: a token that is a target becomes the sum, in float32 at
            least, of `weight * inputs_embeds[source]` over its entries; a target of -1 is padding.
        backend: only there so that the signature is the package's; the reference has none.

    Returns:
        `Compacted`: `[B, T', C]`; positions `[..., B, T']`; 1 at tokens and 0 at padding `[B, T']`; the index of each
        token in its row `[B, T']`.
    """
    if backend is not None:
        raise ValueError(f"the reference has no backends: expected backend=None, got {backend!r}")
    if inputs_embeds.dim() == 2:
        positions = None if position_ids is None else position_ids.unsqueeze(-2)
        entries = None if merge is None else [part[None] for part in merge]
        rows = compact(inputs_embeds[None], keep_mask[None], position_ids=positions, length=length, merge=entries)
        return Compacted(rows[0][0], rows[1].squeeze(-2), rows[2][0], rows[3][0])

    batch, num_tokens, hidden_size = inputs_embeds.shape
    device = inputs_embeds.device
    if position_ids is None:
        position_ids = torch.arange(num_tokens, device=device)[None]
    kept = [[token for token in range(num_tokens) if keep_mask[b, token]] for b in range(batch)]
    if length is None:
        length = max((len(row) for row in kept), default=0)

    embeds = torch.zeros(batch, length, hidden_size, dtype=inputs_embeds.dtype, device=device)
    positions = torch.zeros(*position_ids.shape[:-2], batch, length, dtype=position_ids.dtype, device=device)
    mask = torch.zeros(batch, length, dtype=torch.int64, device=device)
    source = torch.zeros(batch, length, dtype=torch.int64, device=device)
    for b, row in enumerate(kept):
        for slot, token in zip(range(length - len(row), length), row, strict=True):
            embeds[b, slot] = inputs_embeds[b, token]
            positions[..., b, slot] = position_ids[..., b if position_ids.shape[-2] > 1 else 0, token]
            mask[b, slot] = 1
            source[b, slot] = token
            entries = [] if merge is None else (merge[0][b] == token).nonzero().flatten().tolist()
            if entries:
                wide = torch.promote_types(inputs_embeds.dtype, torch.float32)
                total = torch.zeros(hidden_size, dtype=wide, device=device)
                for entry in entries:
                    total += merge[2][b, entry] * inputs_embeds[b, merge[1][b, entry]].to(wide)
                embeds[b, slot] = total.to(inputs_embeds.dtype)
    return Compacted(embeds, positions, mask, source)
