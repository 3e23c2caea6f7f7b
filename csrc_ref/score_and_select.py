"""HAWK's first half of a prefill: score every visual token, keep the best."""

from csrc_ref.score_tokens import score_tokens
from csrc_ref.select_topk import select_topk


def score_and_select(
    q, k, w, r, *, q_mask=None, k_mask=None, normalize=None, scale=None, rounding="floor", backend=None
):
    """`select_topk(score_tokens(...))`; shapes as there.

    The paper is `normalize=None, rounding="floor"`; the authors' release is `normalize="l2", rounding="ceil"`.
    """
    scores = score_tokens(q, k, w, q_mask=q_mask, k_mask=k_mask, normalize=normalize, scale=scale, backend=backend)
    return select_topk(scores, r, mask=k_mask, rounding=rounding)
