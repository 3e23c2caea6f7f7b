"""Key norm: the longer a token's keys, the higher it ranks, or the other way round (arXiv 2406.11430)."""

import math


def key_norm_scores(keys, *, keep="longest"):
    """Return `mean_h |k[h, m]|_2` for `keys [Hkv, M, D]`, or minus that for `keep="shortest"`; a list of floats."""
    heads, sign = keys.tolist(), {"shortest": -1, "longest": 1}[keep]
    return [sign * sum(math.hypot(*head[m]) for head in heads) / len(heads) for m in range(len(heads[0]))]
