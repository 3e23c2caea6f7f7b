"""Select greedily in PyTorch, with a few whole-row steps for each pick, for all rows of the batch at once.

Cosines of all pairs are one matrix product where they fit in memory, and a product with the picked token's vector for
each pick where they do not. Nothing is recomputed from the tokens picked before: the nearest picked token is a running
maximum, and the determinant grows by one row of a Cholesky factor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hawk_kernels.selection import Selection, kept_counts, max_kept

# Cosines of a batch that are held at once: 1 GiB of float32.
_MATRIX = 1 << 28
_TILE = 1 << 22
_COLUMNS = 16
# Above this, float32 cannot tell a cosine from that of equal tokens.
SAME = 1 - 1e-6
# Between these lengths no square of an entry over- or underflows.
_SHORT, _LONG = 1e-15, 1e18
# Below any cosine and above any, by more than their range.
_UNLIKE, _BROKEN = -8.0, 4.0
# Distance at which the first token counts as picked: more than any.
FIRST = 3.0
# A token less of whose squared length is outside the span of the picked ones adds nothing that float32 can tell.
SPANNED = 1e-5
# Tokens in the span rank after all others, whose gain is at least SPANNED * LEAST_QUALITY**2.
SPANNED_GAIN = 2.0**-60
LEAST_QUALITY = 1e-6
# Tokens that are not finite rank after those.
BROKEN_QUALITY = 1e-16

Picks = tuple[torch.Tensor, torch.Tensor]


class Cosines:
    """Cosine similarity of every pair of tokens of a row; what float32 cannot tell from 1 is `SAME`.

    Args:
        unit: float32 `[B, M, D]`, tokens of length 1 or 0.
        counts: bool `[B, M]`, False where a token is similar to none; None: all count.
        itself: what a token's similarity to itself is replaced by, or None.

    Attributes:
        matrix: float32 `[B, M, M]`, or None where a row's does not fit in memory.
    """

    def __init__(self, unit: torch.Tensor, counts: torch.Tensor | None = None, itself: float | None = None) -> None:
        batch, num_tokens, _ = unit.shape
        self._unit, self._itself = unit, itself
        self._offset = unit.new_zeros(batch, num_tokens)
        if counts is not None:
            self._offset.masked_fill_(~counts, _UNLIKE)
        self.matrix = self._block(slice(None)) if num_tokens**2 <= _MATRIX else None
        if self.matrix is not None and itself is not None:
            self.matrix.diagonal(dim1=1, dim2=2).fill_(itself)
        self._row_starts = torch.arange(0, batch * num_tokens, num_tokens, device=unit.device)

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Similarity of one token of each row, int64 `[B]`, to all tokens of the row, `[B, M]`."""
        place = tokens + self._row_starts
        if self.matrix is not None:
            return self.matrix.flatten(0, 1).index_select(0, place)
        picked = self._unit.flatten(0, 1).index_select(0, place)
        offset = self._offset.flatten().index_select(0, place).view(-1, 1, 1)
        rows = torch.baddbmm(offset, self._unit, picked.unsqueeze(2)).squeeze(2).clamp_(max=SAME)
        return rows if self._itself is None else rows.scatter_(1, tokens.unsqueeze(1), self._itself)

    def nearest(self) -> torch.Tensor:
        """Similarity of each token to the most similar other one, `[B, M]`; below any cosine where no other counts."""
        batch, num_tokens, _ = self._unit.shape
        nearest = self._unit.new_full((batch, num_tokens), -torch.inf)
        height = max(_COLUMNS, _TILE // max(1, batch * num_tokens))
        for start in range(0, num_tokens, height):
            rows = slice(start, start + height)
            tile = self._block(rows) if self.matrix is None else self.matrix[:, rows]
            own = tile.diagonal(offset=start, dim1=1, dim2=2)
            before = own.clone()
            own.fill_(-torch.inf)
            torch.maximum(nearest, tile.amax(dim=1), out=nearest)
            own.copy_(before)
        return nearest

    def _block(self, rows: slice) -> torch.Tensor:
        offset = self._offset[:, rows].unsqueeze(2)
        return torch.baddbmm(offset, self._unit[:, rows], self._unit.transpose(1, 2)).clamp_(max=SAME)


def greedy_max_min(
    features: torch.Tensor,
    r: float | int,
    mask: torch.Tensor | None,
    rounding: str,
    picks: Callable[..., Picks] | None = None,
) -> Selection:
    """Select among validated features `[B, M, D]` by `max_min_picks` or another backend's."""

    def select(rows: slice) -> Selection:
        unit, candidates, finite = unit_vectors(features[rows], None if mask is None else mask[rows])
        cosines = Cosines(unit, candidates & finite, itself=torch.inf)
        budget = None if mask is None else kept_counts(r, candidates.sum(dim=1), rounding)
        distance, order = (picks or max_min_picks)(cosines, candidates, finite, budget, width)
        return as_selection(order, distance, candidates, num_tokens)

    num_tokens = features.shape[1]
    width = max_kept(r, num_tokens, rounding)
    return _in_parts(select, features.shape[0], num_tokens)


def max_min_picks(
    cosines: Cosines,
    candidates: torch.Tensor,
    finite: torch.Tensor,
    budget: torch.Tensor | None,
    width: int,
) -> Picks:
    """Make the picks one after another.

    Args:
        cosines: of the tokens, of which finite candidates count, and infinite from each to itself.
        candidates: bool `[B, M]`, of which the last is False.
        finite: bool `[B, M]`, False at candidates that come last.
        budget: int64 `[B]`, or None where every row makes `width` picks.
        width: the largest budget.

    Returns:
        float32 `[B, M]`, distance to the nearest token that was picked before (at the end: to any that was picked), and
        int64 `[B, width]`, the picks, padded with M - 1 where a row makes fewer.
    """
    batch, padding = candidates.shape[0], candidates.shape[1] - 1
    nearest, worst = before_the_first(cosines, candidates, finite)
    at_pick = nearest.new_empty(width, batch)
    order = torch.empty(width, batch, dtype=torch.int64, device=nearest.device)
    for place in range(width):
        torch.min(nearest, dim=1, out=(at_pick[place], order[place]))
        if budget is not None:
            # the padding token is similar to none, so that a row that is full stays as it is
            order[place] = torch.where(budget > place, order[place], padding)
        # the first pick is far from all others, the next ones from those that are picked
        torch.maximum(nearest if place else worst, cosines.rows(order[place]), out=nearest)
    return as_distances(nearest, at_pick.T, order.T), order.T


def before_the_first(
    cosines: Cosines, candidates: torch.Tensor, finite: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity to the nearest other token, by which the first is picked, and what the next picks begin with."""
    nearest = cosines.nearest()
    worst = torch.full_like(nearest, -torch.inf)
    # larger than any cosine, so that they rank after all that are finite
    worst.masked_fill_(~finite, _BROKEN).masked_fill_(~candidates, torch.inf)
    return torch.maximum(nearest, worst), worst


def as_distances(nearest: torch.Tensor, at_pick: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Distances `[B, M]` from the similarity to the nearest token at the end and, of those picked `[B, K]`, before."""
    if order.shape[1]:
        nearest = nearest.scatter(1, order, at_pick).scatter_(1, order[:, :1], 1 - FIRST)
    return (1 - nearest).masked_fill_((nearest >= SAME) & (nearest <= 1), 0.0)


def greedy_dpp(
    features: torch.Tensor,
    quality: torch.Tensor,
    r: float | int,
    mask: torch.Tensor | None,
    rounding: str,
    picks: Callable[..., Picks] | None = None,
) -> Selection:
    """Select among validated features `[B, M, D]` of float32 quality `[B, M]` by `dpp_picks` or another backend's."""

    def select(rows: slice) -> Selection:
        unit, candidates, finite = unit_vectors(features[rows], None if mask is None else mask[rows])
        weight = squared_quality(quality[rows], candidates, finite)
        budget = None if mask is None else kept_counts(r, candidates.sum(dim=1), rounding)
        # a token that comes last for its quality has a vector all the same, and counts as spanned
        length = unit.square().sum(dim=2).round_().masked_fill_(weight < LEAST_QUALITY**2 / 2, 0.0)
        gains, order = (picks or dpp_picks)(Cosines(unit), length, weight, budget, width)
        return as_selection(order, gains, candidates, num_tokens)

    num_tokens = features.shape[1]
    width = max_kept(r, num_tokens, rounding)
    return _in_parts(select, features.shape[0], num_tokens)


def dpp_picks(
    cosines: Cosines, length: torch.Tensor, weight: torch.Tensor, budget: torch.Tensor | None, width: int
) -> Picks:
    """Make the picks one after another, by a Cholesky factor that grows (Chen et al., arXiv 1709.05135, algorithm 1).

    Args:
        cosines: of the tokens.
        length: float32 `[B, M]`, 1 or, for a zero vector, 0.
        weight: float32 `[B, M]`, squared quality; `-inf` at what is no candidate, the last token among them.
        budget: int64 `[B]`, or None where every row makes `width` picks.
        width: the largest budget.

    Returns:
        float32 `[B, M]`, the factor by which a token multiplied the determinant (or would now), and int64 `[B, width]`,
        the picks, padded with M - 1 where a row makes fewer.
    """
    batch, padded = weight.shape
    padding = padded - 1
    weight, outside = weight.clone(), length.clone()
    factor = weight.new_zeros(batch, width, padded)
    at_pick = weight.new_zeros(batch, padded)
    order = torch.full((batch, width), padding, dtype=torch.int64, device=weight.device)
    for place in range(width):
        gain = torch.nn.functional.threshold(outside, SPANNED, SPANNED_GAIN).mul_(weight)
        picked = gain.argmax(dim=1)
        if budget is not None:
            active = budget > place
            picked = torch.where(active, picked, padding)
        order[:, place] = picked
        chosen = picked.unsqueeze(1)
        at_pick.scatter_(1, chosen, gain.gather(1, chosen))
        weight.scatter_(1, chosen, -torch.inf)
        remains = outside.gather(1, chosen)
        # a spanned token, and the padding token, a vector of zeros, take nothing away from others
        scale = remains.rsqrt().masked_fill_(remains <= SPANNED, 0.0)
        row = cosines.rows(picked)
        if place:
            before = factor[:, :place]
            taken = before.gather(2, chosen.unsqueeze(1).expand(-1, place, 1))
            row = torch.baddbmm(row.unsqueeze(1), taken.transpose(1, 2), before, alpha=-1).squeeze(1)
        torch.mul(row, scale, out=factor[:, place])
        outside.addcmul_(factor[:, place], factor[:, place], value=-1)
    gain = torch.nn.functional.threshold(outside, SPANNED, SPANNED_GAIN).mul_(weight)
    was_picked = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, order, True)
    return torch.where(was_picked, at_pick, gain), order


def unit_vectors(features: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale tokens to length 1 (0 where they are zero or not finite); say which are candidates and which are finite.

    At least one token of zeros, no candidate, is appended, up to a multiple of `_COLUMNS`: a matrix product
    adds in another order in its last columns, so that equal tokens there would get another last bit and no longer tie.
    """
    batch, num_tokens, dim = features.shape
    extra = _COLUMNS - num_tokens % _COLUMNS
    vectors = torch.zeros(batch, num_tokens + extra, dim, dtype=torch.float32, device=features.device)
    own = vectors[:, :num_tokens].copy_(features)
    norm = torch.linalg.vector_norm(own, dim=2, keepdim=True)
    is_ordinary = (norm > _SHORT) & (norm < _LONG)
    finite = torch.ones_like(is_ordinary)
    # on a CPU reading this is no sync, and the passes below would take a tenth of the time of the cosines
    if dim and not (features.device.type == "cpu" and bool(is_ordinary.all())):
        # squares of some may over- or underflow
        largest = own.abs().amax(dim=2, keepdim=True)
        finite = largest.isfinite()
        own.div_(torch.where(largest > 0, largest, 1.0)).masked_fill_(~finite, 0.0)
        norm = torch.linalg.vector_norm(own, dim=2, keepdim=True)
    own.div_(torch.where(norm > 0, norm, 1.0))
    candidates = torch.ones(batch, num_tokens, dtype=torch.bool, device=features.device) if mask is None else mask
    beyond = (0, extra)
    return vectors, torch.nn.functional.pad(candidates, beyond), torch.nn.functional.pad(finite.squeeze(2), beyond)


def squared_quality(quality: torch.Tensor, candidates: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """`(q / max q)^2` of the candidates, bounded from below, float32 as `candidates`; `-inf` elsewhere."""
    quality = torch.nn.functional.pad(quality.abs(), (0, candidates.shape[1] - quality.shape[1]))
    finite = finite & quality.isfinite()
    known = torch.where(candidates & finite, quality, 0.0)
    largest = known.amax(dim=1, keepdim=True)
    relative = (known / torch.where(largest > 0, largest, 1.0)).clamp_(min=LEAST_QUALITY)
    return torch.where(finite, relative, BROKEN_QUALITY).square_().masked_fill_(~candidates, -torch.inf)


def as_selection(order: torch.Tensor, scores: torch.Tensor, candidates: torch.Tensor, num_tokens: int) -> Selection:
    """Make the selection of given picks.

    Args:
        order: int64 `[B, K]`, picks, padded with `num_tokens` or more where a row makes fewer.
        scores: float32 `[B, M']`.
        candidates: bool `[B, M']`.
        num_tokens: M, at most M'.
    """
    mask = torch.zeros_like(candidates).scatter_(1, order, True)[:, :num_tokens].contiguous()
    ascending = order.contiguous().sort(dim=1).values
    indices = torch.where(ascending < num_tokens, ascending, -1)
    return Selection(mask, indices, scores.masked_fill(~candidates, -torch.inf)[:, :num_tokens].contiguous())


def _in_parts(select: Callable[[slice], Selection], batch: int, num_tokens: int) -> Selection:
    """Select for as many rows at a time as have cosines that fit in memory together."""
    together = max(1, _MATRIX // (num_tokens + _COLUMNS) ** 2)
    if batch <= together:
        return select(slice(None))
    parts = [select(slice(start, start + together)) for start in range(0, batch, together)]
    return Selection(*(torch.cat(field) for field in zip(*parts, strict=True)))
