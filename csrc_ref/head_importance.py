"""Head importance from drops in score: the offline half of HAWK (arXiv 2604.07812), as the paper writes it."""

import torch


def head_importance(deltas):
    """Return the importance `w[i]` of every attention head.

    Args:
        deltas: `dS[i,j] = S_base[j] - S[i,j]`, `[H, N_d]`: what head `i` costs benchmark `j` when it sees no visual
            tokens.

    Returns:
        float64 `[H]`.
    """
    num_heads, num_benchmarks = deltas.shape
    d = [[float(deltas[i, j]) for j in range(num_benchmarks)] for i in range(num_heads)]
    weights = []
    for i in range(num_heads):
        w = 0.0
        for j in range(num_benchmarks):
            smallest = min(d[h][j] for h in range(num_heads))
            shifted = [d[h][j] - smallest for h in range(num_heads)]  # S'[i,j] = dS[i,j] - min_i dS[i,j]
            if max(shifted) <= 1e-9:  # no head moves the score: the benchmark counts as uniform
                w += 1 / num_heads
            else:
                w += shifted[i] / sum(shifted)  # S'[i,j] / sum_i S'[i,j]
        weights.append(w / num_benchmarks)  # w[i] = 1/N_d * sum_j
    return torch.tensor(weights, dtype=torch.float64)
