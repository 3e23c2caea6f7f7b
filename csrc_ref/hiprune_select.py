"""HiPrune's choice (arXiv 2508.00553), token by token: anchors, their neighbours, then registers."""

import torch

from csrc_ref.select_topk import Selection, _count, _rank


def hiprune_select(object_attention, deep_attention, r, *, grid, alpha=0.1, rounding="floor"):
    """Keep exactly `K = max(1, floor(r * M))` tokens of each row.

    Args:
        object_attention: `[B, M]` or `[M]`, attention that each token receives in the object (middle) layer.
        deep_attention: the same in the last layer.
        r: float in (0, 1] = fraction kept, int >= 1 = budget.
        grid: `(h, w)`, `(t, h, w)`, or a list with one of these per image.
        alpha: share of anchors and their neighbours in the budget.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Returns:
        `Selection(mask, indices, scores)`; scores are the deep attention.
    """
    if object_attention.dim() == 1:
        row = hiprune_select(object_attention[None], deep_attention[None], r, grid=grid, alpha=alpha, rounding=rounding)
        return Selection(*(field[0] for field in row))
    batch, num_tokens = object_attention.shape
    grids = [grid] if isinstance(grid[0], int) else grid
    budget = _count(r, num_tokens, rounding)
    mask = torch.zeros(batch, num_tokens, dtype=torch.bool)
    indices = torch.full((batch, budget), -1, dtype=torch.int64)
    for b in range(batch):
        of_object, of_deep = object_attention[b].float().tolist(), deep_attention[b].float().tolist()
        by_object = sorted(range(num_tokens), key=lambda token: _rank(of_object[token]))
        by_deep = sorted(range(num_tokens), key=lambda token: _rank(of_deep[token]))
        anchors = by_object[: round(alpha * budget / 5)]
        near = {neighbour for anchor in anchors for neighbour in _neighbours(anchor, grids)}
        buffers = [token for token in by_object if token in near and token not in anchors]
        registers = [token for token in by_deep if token not in anchors and token not in near]
        kept = sorted((anchors + buffers + registers)[:budget])
        mask[b, kept] = True
        indices[b] = torch.tensor(kept, dtype=torch.int64)
    return Selection(mask, indices, deep_attention.float())


def _neighbours(token, grids):
    """Up, down, left and right of a token within its frame of its image."""
    start = 0
    for grid in grids:
        frames, height, width = (1, *grid) if len(grid) == 2 else grid
        for _ in range(frames):
            row, column = (token - start) // width, (token - start) % width
            if start <= token < start + height * width:
                around = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
                return [start + y * width + x for y, x in around if 0 <= y < height and 0 <= x < width]
            start += height * width
    raise ValueError("grid: expected as many cells as tokens")
