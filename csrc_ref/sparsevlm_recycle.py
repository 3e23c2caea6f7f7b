"""SparseVLM's recycling (arXiv 2410.04417), token by token: the best dropped tokens come back as means of clusters."""

import math


def sparsevlm_recycle(scores, states, budget, merging="paper"):
    """Keep the highest scores and clusters of what is left.

    Args:
        scores: of the tokens of one image, `[M]`.
        states: `[M, hidden]`.
        budget: how many tokens stay.
        merging: "paper" = 30 % of what the budget drops, and densities of 5 neighbours; "release" = 30 % of all but
            the tokens that stay by themselves, and one more, and densities of as many tokens as clusters, the token
            itself among them.

    Returns:
        The kept tokens in ascending order, and for each centre of a cluster the tokens that it is the mean of.
    """
    order = sorted(range(len(scores)), key=lambda m: (-float(scores[m]), m))
    if merging == "release":
        fitting = [a for a in range(1, budget) if a + _clusters_of_release(len(scores) - a) <= budget]
        alone = max(fitting, default=1) if budget < len(scores) else budget
        clusters = budget - alone
        recycled = int((len(scores) - alone) * 0.3) + 1
    else:
        recycled = (len(scores) - budget) * 30 // 100
        clusters = min(recycled // 10 + 1, budget - 1) if recycled else 0
        alone = budget - max(0, clusters)
    if clusters < 1:
        return sorted(order[:budget]), {}
    near, itself = (clusters - 1, 1) if merging == "release" else (5, 0)
    members = density_peaks(states, order[alone : alone + recycled], clusters, near, itself)
    return sorted([*order[:alone], *members]), members


def _clusters_of_release(dropped):
    recycled = int(dropped * 0.3) + 1
    return int(recycled / 10) + 1


def density_peaks(states, pool, clusters, near=5, itself=0):
    """Return the tokens of each cluster by its centre (Rodriguez and Laio, Science 2014), with `near` neighbours."""

    def distance(i, j):
        return float((states[i].double() - states[j].double()).norm()) / math.sqrt(states.shape[1])

    density = {}
    for i in pool:
        nearest = sorted(distance(i, j) for j in pool if j != i)[:near]
        density[i] = math.exp(-sum(d**2 for d in nearest) / max(1, len(nearest) + itself))
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
