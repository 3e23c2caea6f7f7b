"""Lets embeddings that come without token ids through if they are those of text alone."""

from __future__ import annotations

from typing import Any

import torch

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.hooks import outside_graphs, visual_features

_ROWS_AT_ONCE = 2048
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_text(anatomy: Anatomy, arguments: dict[str, Any]) -> None:
    """Refuse a call of the multimodal model by embeddings that may be those of visual tokens.

    Raises:
        ValueError: images came too, or an embedding is not that of a text token.
    """
    embeds = arguments["inputs_embeds"]
    if visual_features(arguments, anatomy.family.features) or not are_text(anatomy, embeds):
        raise ValueError(
            "input_ids: expected the token ids of the prompt, got inputs_embeds only, which do not tell which "
            "tokens are visual; pass input_ids and pixel_values, or leave the prune block. Only embeddings of text "
            "that are exactly those of model.get_input_embeddings() need no ids"
        )


@outside_graphs
@torch.no_grad()
def are_text(anatomy: Anatomy, inputs_embeds: torch.Tensor) -> bool:
    """Tell whether each embedding equals that of some text token bit for bit, which no image feature does.

    This waits for the device. Embeddings that cannot be traced to a token do not count as text: soft prompts, for
    example, or embeddings in another dtype than the model's.

    Args:
        anatomy: the model's parts.
        inputs_embeds: `[B, T, hidden]`.
    """
    head: Any = anatomy.head
    table = head.get_input_embeddings()
    count = getattr(table, "num_embeddings", None)
    if count is None:
        return False
    weights = torch.randint(2**62, inputs_embeds.shape[-1:], generator=torch.Generator().manual_seed(0)) * 2 + 1
    wanted = _prints(inputs_embeds.flatten(0, 1), weights)
    is_known = torch.zeros_like(wanted, dtype=torch.bool)
    visual = torch.tensor(anatomy.visual_token_ids, dtype=torch.int64)
    device = next(table.parameters()).device
    for ids in torch.arange(count).split(_ROWS_AT_ONCE):
        rows = table(ids[~torch.isin(ids, visual)].to(device))
        if rows.dtype != inputs_embeds.dtype:
            return False
        is_known |= torch.isin(wanted, _prints(rows, weights).to(wanted.device))
    return bool(is_known.all())


def _prints(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Hash the bits of each row of `[N, C]`, int64 `[N]`; rows that differ have equal hashes only by chance."""
    bits = rows.contiguous().view(_INTEGERS[rows.element_size()]).to(torch.int64)
    return (bits * weights.to(bits.device)).sum(dim=1)
