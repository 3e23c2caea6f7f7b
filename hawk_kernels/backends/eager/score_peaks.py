"""Score by peaks of attention in PyTorch, from a few text tokens of the heads that share a key at a time.

A text token's row must be whole before it can be normalised, so a tile is as long as a row of keys and has as many text
tokens as fit into the cache: the products are read again by the norm and the maximum while they are still there.

The products alone are `2 H N M D` operations, more than half of the time, where a mean over the text needs those of a
single text token. PyTorch's softmax reads a tile that is in the cache faster than `logsumexp` and one exponential of
each key's largest difference do.
"""

from __future__ import annotations

from functools import reduce

import torch

# Products of a tile: 2 MB of float32, which stay in a core's cache.
_TILE = 1 << 19
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def score_peaks(
    q: torch.Tensor,
    k: torch.Tensor,
    w: torch.Tensor,
    q_mask: torch.Tensor | None,
    k_mask: torch.Tensor | None,
    normalize: str | None,
    scale: float,
) -> torch.Tensor:
    """Compute importance `[B, M]` float32 of validated `[B, H, N, D]` queries and `[B, Hkv, M, D]` keys."""
    batch, num_key_value_heads, num_keys, _ = k.shape
    weights = w.float().view(num_key_value_heads, -1)
    scores = k.new_zeros((batch, num_keys), dtype=torch.float32)
    for row in range(batch):
        counts = None if q_mask is None else q_mask[row]
        outside = None if k_mask is None else ~k_mask[row]
        if k.device.type == "cpu" and outside is not None and not outside.any():
            outside = None
        for group, queries in enumerate(q[row].unflatten(0, (num_key_value_heads, -1))):
            peaks = _peaks(queries, k[row, group], counts, outside, normalize, scale)
            scores[row] += weights[group] @ peaks
    return scores if k_mask is None else scores.masked_fill_(~k_mask, -torch.inf)


def _peaks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    counts: torch.Tensor | None,
    outside: torch.Tensor | None,
    normalize: str | None,
    scale: float,
) -> torch.Tensor:
    """Compute `max_n norm(q[n] . k)`, float32 `[R, M]`, of queries `[R, N, D]` that share the keys `[M, D]`.

    Args:
        queries, keys: of one row and one KV head.
        counts: bool `[N]`, the text tokens that count; all where it is None.
        outside: bool `[M]`, the keys that no norm may see.
        normalize, scale: as in `score_peaks`.
    """
    if counts is not None and counts.device.type == "cpu":
        # reading a mask is no host sync on a CPU
        queries, counts = queries[:, counts], None
    group_size, num_queries, _ = queries.shape
    num_keys = keys.shape[0]
    if num_queries == 0 or num_keys == 0:
        return queries.new_zeros((group_size, num_keys), dtype=torch.float32)
    keys = keys.float().contiguous()

    def peaks_of(tokens: slice) -> torch.Tensor:
        tile = queries[:, tokens].float() * scale
        products = _products(tile.flatten(0, 1), keys)
        normalized = _normalized(products, outside, normalize).view(group_size, -1, num_keys)
        if counts is not None:
            normalized = normalized.masked_fill(~counts[tokens, None], -torch.inf)
        return normalized.amax(dim=1)

    parts = -(-group_size * num_queries * num_keys // _TILE)
    together = -(-num_queries // parts)
    tiles = (slice(start, start + together) for start in range(0, num_queries, together))
    peaks = reduce(torch.maximum, map(peaks_of, tiles))
    return peaks if counts is None else torch.where(counts.any(), peaks, 0.0)


def _products(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Multiply float32 queries `[P, D]` with keys `[M, D]`: `[P, M]`.

    oneDNN is what PyTorch itself calls for half precision; on AMD's processors its float32 product takes half as long
    as MKL's.
    """
    if _HAS_ONEDNN and keys.device.type == "cpu":
        products: torch.Tensor = torch.ops.mkldnn._linear_pointwise(queries, keys, None, "none", [], "")
        return products
    return queries @ keys.T


def _normalized(products: torch.Tensor, outside: torch.Tensor | None, normalize: str | None) -> torch.Tensor:
    """Normalise each row of `products [P, M]`, which may be overwritten, over the keys that are not `outside`."""
    # a sum is not finite where a product is not; looking at it is a host sync on a GPU
    if products.device.type != "cpu" or not torch.isfinite(products.sum(dim=-1).sum()):
        products.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    if normalize == "softmax":
        if outside is not None:
            products.masked_fill_(outside, -torch.inf)
        return torch.softmax(products, dim=-1, out=products)
    if normalize == "l2":
        if outside is not None:
            products.masked_fill_(outside, 0.0)
        # float64, in which no square over- or underflows; below float32's normal range a row has no direction left
        norm = torch.linalg.vector_norm(products, dim=-1, keepdim=True, dtype=torch.float64)
        return products.div_(norm.masked_fill_(norm < torch.finfo(torch.float32).tiny, torch.inf))
    if normalize == "minmax":
        lowest = (products if outside is None else products.masked_fill(outside, torch.inf)).amin(-1, keepdim=True)
        highest = (products if outside is None else products.masked_fill(outside, -torch.inf)).amax(-1, keepdim=True)
        extent = highest - lowest
        return products.sub_(lowest).div_(extent.masked_fill_(extent == 0, torch.inf))
    return products
