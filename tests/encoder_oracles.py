"""What a vision encoder attends to and what becomes of its tokens, found without the package: eager weights, nudges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


@contextmanager
def eager_columns(tower: Any, of_first: bool = False) -> Iterator[dict[nn.Module, list[torch.Tensor]]]:
    """Inside, the tower attends by a literal softmax; what each token receives, of each call of each attention module.

    Args:
        of_first: count what the first query row gives, which is that of CLS, instead of all rows.

    Yields:
        float32 `[tokens]` or `[tiles, tokens]`: the mean over heads of the sum over query rows.
    """
    received: dict[nn.Module, list[torch.Tensor]] = defaultdict(list)

    def literal(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        logits = query @ key.transpose(2, 3) * scaling
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask, -torch.inf)
        weights = torch.softmax(logits, dim=-1)
        rows = weights if attention_mask is None else weights * attention_mask[:, :, :1].mT
        rows = rows[:, :, :1] if of_first else rows
        received[module].append(rows.mean(dim=1).sum(dim=1).detach())
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("literal", literal)
    AttentionMaskInterface.register("literal", sdpa_mask)
    configs = {id(module.config): module.config for module in tower.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = "literal"
    try:
        yield received
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def influence(layer: nn.Module, features: Any, num_tokens: int) -> torch.Tensor:
    """Which visual tokens a token of the encoder has a say in: bool `[visual tokens, tokens of the encoder]`.

    Args:
        layer: the encoder layer whose output the features are made of; it ends in `mlp` or `ffn`.
        features: makes them, `[visual tokens, hidden]`.
        num_tokens: of the encoder, all tiles together.
    """

    def nudge(token, module, args, output):
        push = torch.zeros(num_tokens, output.shape[-1])
        push[token] = torch.linspace(1, 3, output.shape[-1])
        return output + push.view_as(output)

    with torch.no_grad():
        usual, columns = features(), []
        for token in range(num_tokens):
            handle = (layer.mlp if hasattr(layer, "mlp") else layer.ffn).register_forward_hook(partial(nudge, token))
            columns.append((features() - usual).abs().amax(dim=-1) > 1e-6)
            handle.remove()
    return torch.stack(columns, dim=1)
