"""FastV: the visual tokens that the last token attends to in an early layer (arXiv 2403.06764)."""

from __future__ import annotations

import numbers

import torch

from hawk_kernels.methods.base import Method
from hawk_kernels.methods.view import PrefillView
from hawk_kernels.ops.attention_column_mean import attention_column_mean
from hawk_kernels.validation import check_rounding


class FastV(Method):
    """Hides visual tokens from the layers behind the first `layer` ones, by the attention of the last token there.

    `I[m] = mean over heads of softmax(q_last k^T / sqrt(d))[m]` in layer `layer`, counted from 1, after RoPE (Chen et
    al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764, with `K = layer`; the authors take
    K = 2). Layers 1 to K see every token; the layers behind do not see those that were not kept, neither in the prompt
    nor while they generate.

    This is FastV's accuracy, not its speed: tokens are hidden by attention masks, as the authors' code can do too, so
    that the sequence, the cache and the logits keep their length. Removing them inside the stack is another mechanism;
    what it computes for the kept tokens is the same. Needs sdpa or eager attention, and a model all of whose layers
    from `layer` on have attention. A cache that was filled inside the block must be continued inside one.

    Args:
        layer: the last layer that sees every token, counted from 1.
        rounding: "floor" or "ceil".

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "fastv"
    uses_positions = True

    def __init__(self, layer: int = 2, rounding: str = "floor") -> None:
        expected = "layer: expected the last layer that sees every token, counted from 1"
        if isinstance(layer, bool) or not isinstance(layer, numbers.Integral):
            raise TypeError(f"{expected}, got {type(layer).__name__}; the paper takes 2")
        if layer < 1:
            raise ValueError(f"{expected}, got {layer}; the paper takes 2")
        self.hidden_from_layer = int(layer)
        self.rounding = check_rounding(rounding)

    def options(self) -> dict[str, object]:
        return {"layer": self.hidden_from_layer, "rounding": self.rounding}

    def score(self, view: PrefillView) -> torch.Tensor:
        last = view.last_query()
        query, keys = last.query, last.keys
        if keys.dtype == torch.float64:
            query, keys = query.float(), keys.float()
        attention = attention_column_mean(query, keys, reduce_heads=False, scale=last.scale)
        # copies stand where the token sees nothing, so that they neither underflow the softmax nor count
        attention.masked_fill_(~last.visible.unsqueeze(1), 0.0)
        attention /= attention.sum(dim=-1, keepdim=True)
        return attention.mean(dim=1).gather(1, last.visual).masked_fill_(~view.candidates, -torch.inf)
