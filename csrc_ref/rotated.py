"""Rotary position embeddings (arXiv 2104.09864), one pair of a head's entries at a time."""

import math

import torch


def rotated(heads, positions, *, theta=10000.0, sections=None):
    """Rotate `heads [H, N, D]` to `positions [N]`, or `[axes, N]` with M-RoPE; entries `i` and `i + D / 2` are a pair.

    Pair `i` turns by the angle `p * theta ** (-2 i / D)`. With M-RoPE (Qwen2-VL, arXiv 2409.12191) `sections` says how
    many successive pairs take their `p` from each axis.
    """
    _, length, head_dim = heads.shape
    positions = positions if positions.dim() == 2 else positions[None]
    axes = [0] * (head_dim // 2) if sections is None else [a for a, n in enumerate(sections) for _ in range(n)]
    turned = torch.empty_like(heads)
    for n in range(length):
        for i, axis in enumerate(axes):
            angle = positions[axis, n].item() * theta ** (-2 * i / head_dim)
            real, imaginary = heads[:, n, i], heads[:, n, i + head_dim // 2]
            turned[:, n, i] = real * math.cos(angle) - imaginary * math.sin(angle)
            turned[:, n, i + head_dim // 2] = imaginary * math.cos(angle) + real * math.sin(angle)
    return turned
