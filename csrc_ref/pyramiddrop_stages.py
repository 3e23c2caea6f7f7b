"""PyramidDrop (arXiv 2410.17247): what each stage keeps, one row and one stage at a time."""

import math

from csrc_ref.select_topk import select_topk


def pyramiddrop_stages(attention, visual, ratios):
    """Return the visual tokens that are left after each stage.

    Args:
        attention: for each stage a `[T]`, the attention of the last token, averaged over heads, to the tokens of the
            prompt in the layer after the stage; what it says of tokens that have left does not matter.
        visual: bool `[T]`, the visual tokens of the prompt.
        ratios: for each stage the fraction of the original visual tokens that is left after it.

    Returns:
        For each stage a bool `[T]`.
    """
    left, stages = visual.clone(), []
    total = int(visual.sum())
    for of_stage, ratio in zip(attention, ratios, strict=True):
        # a little more than the product of two floats, which may fall short of a whole number
        budget = max(1, math.floor(total * ratio + 1e-9))
        left = select_topk(of_stage.unsqueeze(0), budget, mask=left.unsqueeze(0)).mask[0]
        stages.append(left)
    return stages
