"""Scores from hidden states in PyTorch: one query a head meets the hidden states, which are never projected."""

from __future__ import annotations

import torch

from hawk_kernels.backends.eager.score_and_select import aligned, weighted_sum
from hawk_kernels.backends.eager.select_topk import select
from hawk_kernels.layer import Layer
from hawk_kernels.selection import Selection

# Tokens that are in float32 at once.
_TOKENS = 2048


def score_hidden(
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None,
    scale: float,
) -> torch.Tensor:
    """Importance `[B, T]` float32 by validated hidden states `[B, T, C]`."""
    norm_weight, norm_eps, wq, bq, wk, bk, _ = layer
    num_heads = w.shape[0]
    num_key_value_heads = wk.shape[0] * num_heads // wq.shape[0]
    gamma = None if norm_weight is None else norm_weight.float()
    mean = _mean_text(x, q_mask, norm_eps)
    if gamma is not None:
        mean = mean * gamma
    query = _matrix_product(mean, wq)
    if bq is not None:
        query = query + bq.float()
    group_size = num_heads // num_key_value_heads
    query = (query * scale).unflatten(-1, (num_key_value_heads, group_size, -1))
    key_weight = wk.float().unflatten(0, (num_key_value_heads, -1))
    folded = torch.einsum("bgid,gdc->bgic", query, key_weight).flatten(1, 2)
    if gamma is not None:
        folded = folded * gamma
    c = _logits(x, k_mask, folded, norm_eps)
    if bk is not None:
        key_bias = bk.float().unflatten(0, (num_key_value_heads, -1))
        c += torch.einsum("bgid,gd->bgi", query, key_bias).flatten(1).unsqueeze(-1)
    num_tokens = x.shape[1]
    outside = torch.nn.functional.pad(~k_mask, (0, c.shape[2] - num_tokens), value=True)
    importance = weighted_sum(c[None, :, None], w.float()[None], outside[None, :, None, None], normalize)[0]
    return importance.masked_fill_(outside, -torch.inf)[:, :num_tokens].contiguous()


def score_hidden_and_select(
    x: torch.Tensor,
    layer: Layer,
    w: torch.Tensor,
    r: float | int,
    q_mask: torch.Tensor,
    k_mask: torch.Tensor,
    normalize: str | None,
    scale: float,
    rounding: str,
) -> Selection:
    """Selection over T by validated hidden states `[B, T, C]`."""
    return select(score_hidden(x, layer, w, q_mask, k_mask, normalize, scale), r, k_mask, rounding)


def _matrix_product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`rows [B, C] @ weight [O, C]^T` in float32, the weight converted a piece at a time."""
    return torch.cat([rows @ piece.float().T for piece in torch.split(weight, _TOKENS)], dim=1)


def _mean_text(x: torch.Tensor, q_mask: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Mean of the normalised text of each row, `[B, C]` float32, NaN where there is none."""
    batch, num_tokens, hidden_size = x.shape
    total = x.new_zeros((batch, hidden_size), dtype=torch.float32)
    if x.device.type == "cpu":
        # No host sync: these are CPU tensors.
        rows, tokens = q_mask.nonzero(as_tuple=True)
        text = x[rows, tokens].float()
        total.index_add_(0, rows, text * _inverse_rms(text, epsilon))
    else:
        for start in range(0, num_tokens, _TOKENS):
            # Zeroed, not multiplied by the mask: what is no text may hold NaN.
            text = x[:, start : start + _TOKENS].float().masked_fill(~q_mask[:, start : start + _TOKENS, None], 0.0)
            total += (text * _inverse_rms(text, epsilon)).sum(dim=1)
    return total / q_mask.sum(dim=1, keepdim=True)


def _inverse_rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + epsilon)


def _logits(x: torch.Tensor, k_mask: torch.Tensor, folded: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`c [B, H, C]` without the bias, C = T rounded up to `COLUMNS`; anything where there is no candidate."""
    batch, num_tokens, hidden_size = x.shape
    c = x.new_zeros((batch, folded.shape[1], aligned(num_tokens)), dtype=torch.float32)
    for row in range(batch):
        places = _places(k_mask[row])
        count = num_tokens if places is None else places.numel()
        if count == 0:
            continue
        # All products have one aligned shape: another one may add in another order, and equal tokens would not tie.
        width = aligned(-(-count // -(-count // _TOKENS)))
        tile = x.new_empty((width, hidden_size), dtype=torch.float32)
        for start in range(0, count, width):
            held = min(width, count - start)
            where: slice | torch.Tensor = slice(start, start + held)
            if places is None:
                states = x[row, where]
            else:
                where = places[start : start + held]
                first, last = int(where[0]), int(where[-1])
                is_span = last - first + 1 == held
                states = x[row, first : last + 1] if is_span else x[row].index_select(0, where)
            tile[:held].copy_(states)
            tile[held:].zero_()
            products = (folded[row] @ tile.T) * _inverse_rms(tile, epsilon).T
            c[row, :, where] = products[:, :held]
    return c


def _places(mask: torch.Tensor) -> torch.Tensor | None:
    """Positions of the candidates; None on a GPU, where all tokens take part because counting waits for the device."""
    return mask.nonzero().squeeze(1) if mask.device.type == "cpu" else None
