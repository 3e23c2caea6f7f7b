"""Uniform down-sampling: each kept token is the middle of its part of the image, by exact fractions."""

import math
from fractions import Fraction


def downsample_places(frames, count):
    """Choose `count` tokens of `(h, w)` frames, ascending: shares by size, then lines, then places on a line."""
    places, start = [], 0
    total = sum(height * width for height, width in frames)
    for height, width in frames:
        share = _share(start, height * width, total, count)
        lines = round(math.sqrt(share * height / width))
        lines = min(max(lines, math.ceil(share / width)), height, share)
        for line in range(lines):
            row = math.floor((line + Fraction(1, 2)) * height / lines)
            on_line = _share(line, 1, lines, share)
            for place in range(on_line):
                places.append(start + row * width + math.floor((place + Fraction(1, 2)) * width / on_line))
        start += height * width
    return places


def _share(before, size, total, count):
    """Count how many of `count` points, spread evenly over `total`, lie between `before` and `before + size`."""
    return math.floor(Fraction(before + size, total) * count) - math.floor(Fraction(before, total) * count)
