"""HAWK's score of rotated queries and keys (arXiv 2604.07812, the ablation with RoPE)."""

from csrc_ref.rotated import rotated
from csrc_ref.score_and_select import score_tokens
from csrc_ref.score_peaks import score_peaks


def hawk_rope_scores(
    queries, keys, weights, *, query_positions, key_positions, sections=None, normalize="l2", reduce="mean"
):
    """Score the keys of one prompt: rotate every query and key to its position, then score as HAWK does.

    Args:
        queries: `[H, N, D]` of the text, before RoPE.
        keys: `[Hkv, M, D]` of the visual tokens, before RoPE.
        weights: `[H]`.
        query_positions, key_positions: `[axes, N]` and `[axes, M]`.
        sections: pairs that turn by each axis, as in `rotated`.
        normalize: as in `score_tokens`, or as in `score_peaks` with the maximum.
        reduce: "mean" or "max" over the text.

    Returns:
        `[M]`.
    """
    turned_queries = rotated(queries, query_positions, sections=sections)
    turned_keys = rotated(keys, key_positions, sections=sections)
    score = score_peaks if reduce == "max" else score_tokens
    return score(turned_queries, turned_keys, weights, normalize=normalize)
