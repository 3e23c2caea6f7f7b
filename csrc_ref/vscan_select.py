"""VScan's stage one (arXiv 2505.22654), token by token: scans of windows and of the picture, and the means of the rest.

Stage two (eq. 5) is a stage of `csrc_ref/pyramiddrop_stages.py`.
"""

import math
from fractions import Fraction

import torch

from csrc_ref.select_topk import _count, _rank


def vscan_select(
    of_picture, of_windows, embeddings, r, *, grids, side, local=0.5, allocation="paper", rounding="floor"
):
    """Return which tokens of one image, or of several that share a budget, stay, and what each of them becomes.

    Args:
        of_picture: `[M]`, the attention of CLS in the deep layer.
        of_windows: `[M]`, the same in the shallow layer.
        embeddings: `[M, hidden]`.
        r: float in (0, 1] = fraction kept, int >= 1 = budget.
        grids: `(t, h, w)` of each image; the tokens are their cells.
        side: cells along the side of a window.
        local: share of the budget for the local scan.
        allocation: "paper" = windows share the budget evenly; "release" = tokens in the order of their attention, at
            most the even share rounded up of each window.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Returns:
        The kept tokens, a sorted list of places, and a dict from each of them to `{token: weight}`.
    """
    windows = _windows(grids, side)
    count = sum(len(window) for window in windows)
    budget = _count(r, count, rounding)
    for_windows = math.floor(budget * Fraction(local).limit_denominator(2**20))

    # the windows, eq. 3
    descending = sorted(range(count), key=lambda i: _rank(of_windows[i].item()))
    chosen = []
    if allocation == "release":
        most = math.ceil(for_windows / len(windows))
        for token in descending:
            window = next(window for window in windows if token in window)
            if len(chosen) < for_windows and sum(other in window for other in chosen) < most:
                chosen.append(token)
    else:
        best = [[token for token in descending if token in window] for window in windows]
        for place in range(count):
            # one more token of each window, those with the highest attention first
            next_ones = [tokens[place] for tokens in best if place < len(tokens)]
            chosen += sorted(next_ones, key=descending.index)
        chosen = chosen[:for_windows]

    # the picture, eq. 1 and 2
    rest = [i for i in range(count) if i not in chosen]
    chosen += sorted(rest, key=lambda i: _rank(of_picture[i].item()))[: budget - len(chosen)]
    kept = sorted(chosen)

    # the means, eq. 4
    groups = {token: [token] for token in kept}
    for token in range(count):
        if token not in groups:
            cosines = [_cosine(embeddings[token], embeddings[one]) for one in kept]
            groups[kept[cosines.index(max(cosines))]].append(token)
    return kept, {token: dict.fromkeys(group, 1 / len(group)) for token, group in groups.items()}


def _windows(grids, side):
    """The places of the tokens of each window; the last of a line or column takes what is left over."""
    windows, start = [], 0
    for frames, height, width in grids:
        lines, columns = max(1, height // side), max(1, width // side)
        for _ in range(frames):
            inside = {(line, column): [] for line in range(lines) for column in range(columns)}
            for y in range(height):
                for x in range(width):
                    line, column = min(y // side, lines - 1), min(x // side, columns - 1)
                    inside[line, column].append(start + y * width + x)
            windows += inside.values()
            start += height * width
    return windows


def _cosine(one, other):
    one, other = one.double(), other.double()
    if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
        return 0.0
    norms = math.hypot(*one.tolist()) * math.hypot(*other.tolist())
    return sum(x * y for x, y in zip(one.tolist(), other.tolist(), strict=True)) / norms if norms else 0.0
