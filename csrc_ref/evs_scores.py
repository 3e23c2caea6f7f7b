"""EVS's scores (arXiv 2510.14624), cell by cell: `1 - cos` to the same cell of the frame before."""

import math


def evs_scores(embeddings, frames):
    """Return the score of each token of one image or video, a list of floats.

    Args:
        embeddings: `[M, hidden]`.
        frames: the grids `(h, w)` of its frames; a first frame, or one after a frame of another size, scores above 2.
    """
    tokens = embeddings.tolist()
    scores, previous, start = [], None, 0
    for height, width in frames:
        for y in range(height):
            for x in range(width):
                cell = start + y * width + x
                if not all(math.isfinite(value) for value in tokens[cell]):
                    scores.append(math.nan)
                elif previous == (height, width):
                    scores.append(1 - _cosine(tokens[cell], tokens[cell - height * width]))
                else:
                    scores.append(3 - bayer(y, x))
        previous, start = (height, width), start + height * width
    return scores


def bayer(y, x):
    """Return the threshold of a cell in Bayer's matrix: that of its corner of 2 x 2, then of 4 x 4, and so on."""
    corner = {(0, 0): 0, (1, 1): 1, (0, 1): 2, (1, 0): 3}
    if y == x == 0:
        return 0.0
    return (corner[y % 2, x % 2] + bayer(y // 2, x // 2)) / 4


def _cosine(one, other):
    norms = math.hypot(*one) * math.hypot(*other)
    return sum(x * y for x, y in zip(one, other, strict=True)) / norms if norms else 0.0
