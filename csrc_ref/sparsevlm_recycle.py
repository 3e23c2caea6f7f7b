"""SparseVLM's recycling (arXiv 2410.04417), token by token: the best dropped tokens come back as means of clusters."""

import math


def sparsevlm_recycle(scores, states, budget):
    """Keep the highest scores and clusters of what is left.

    Args:
        scores: of the tokens of one image, `[M]`.
        states: `[M, hidden]`.
        budget: how many tokens stay.

    Returns:
        The kept tokens in ascending order, and for each centre of a cluster the tokens that it is the mean of.
    """
    order = sorted(range(len(scores)), key=lambda m: (-float(scores[m]), m))
    recycled = (len(scores) - budget) * 30 // 100
    clusters = min(recycled // 10 + 1, budget - 1) if recycled else 0
    if clusters < 1:
        return sorted(order[:budget]), {}
    alone = budget - clusters
    members = density_peaks(states, order[alone : alone + recycled], clusters)
    return sorted([*order[:alone], *members]), members


def density_peaks(states, pool, clusters):
    """Return the tokens of each cluster by its centre (Rodriguez and Laio, Science 2014, with 5 neighbours)."""

    def distance(i, j):
        return float((states[i].double() - states[j].double()).norm()) / math.sqrt(states.shape[1])

    density = {}
    for i in pool:
        nearest = sorted(distance(i, j) for j in pool if j != i)[:5]
        density[i] = math.exp(-sum(d**2 for d in nearest) / max(1, len(nearest)))
    peak = {}
    for i in pool:
        denser = [j for j in pool if (-density[j], j) < (-density[i], i)]
        gap = min(distance(i, j) for j in denser) if denser else max(distance(j, k) for j in pool for k in pool)
        peak[i] = density[i] * gap
    centres = sorted(sorted(pool, key=lambda i: (-peak[i], i))[:clusters])
    members = {centre: [centre] for centre in centres}
    for i in pool:
        if i not in members:
            members[min(centres, key=lambda centre: (distance(i, centre), centre))].append(i)
    return members
