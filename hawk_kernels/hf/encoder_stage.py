"""Merges tokens before the projector, which then runs on sums of the encoder's rows instead of single rows.

The model projects every row before anything is chosen, as it always does. The kept rows are then summed by the merge
map and go through the projector once more; the results take the places of the kept tokens. A projector may make one
visual token from several patches, as that of Qwen2.5-VL does from four. Its row is then these patches side by side, and
a merge averages the patches at the same corner of each square. DeepStack features come from projectors of their own,
whose inputs are not recorded, so these features are merged after they were projected.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.encoders.recorder import PromptAttention
from hawk_kernels.hf.families import MERGES_BEFORE_PROJECTOR, NO_ENCODER_STAGE
from hawk_kernels.hf.hooks import upload
from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.ops.compact import compact
from hawk_kernels.selection import Merge


def check_projector(anatomy: Anatomy, method: str) -> None:
    """Refuse a family whose projector does more than turn each row into the embedding of one visual token.

    Raises:
        TypeError: the family has such a projector.
    """
    name = anatomy.family.model_type
    why = next((reason for names, reason in NO_ENCODER_STAGE.items() if name in names), None)
    if why is not None:
        supported = ", ".join(sorted(MERGES_BEFORE_PROJECTOR))
        raise TypeError(
            f"method: expected one that does not merge before the projector of {name} ({why}), got {method!r}, whose "
            f"stage is 'encoder'; that stage works for {supported}"
        )


def merged_before_projector(
    inputs_embeds: torch.Tensor,
    prompt: Prompt,
    kept: torch.Tensor,
    counts: list[int],
    merge: Merge,
    recorded: PromptAttention,
    project: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return the embeddings `[B, T, hidden]` with those of kept visual tokens projected from merged rows.

    Gradients reach the projector but not the encoder, whose rows were recorded without them.

    Args:
        inputs_embeds: `[B, T, hidden]`.
        prompt: where visual tokens stand.
        kept: bool `[B, T]`, the tokens that stay.
        counts: how many stay in each row.
        merge: the map by which kept tokens become sums of visual tokens; its places count the T tokens.
        recorded: the rows that entered the projector, as "features", and which visual tokens have none.
        project: runs the projector on rows, `[K, C]` to `[K, hidden]`.
    """
    rows = recorded.values["features"]
    device = rows.device
    is_cell = prompt.visual & ~recorded.is_separator
    cells = upload(np.flatnonzero(is_cell), device)
    # the places of one long row, in which all cells of all prompts follow each other
    place = upload(np.cumsum(is_cell).reshape(is_cell.shape) - 1, device)
    target, source, weight = (part.to(device) for part in merge)
    placed = [place.gather(1, places.clamp(min=0)) for places in (target, source)]
    in_one_row = Merge(torch.where(target < 0, -1, placed[0]).view(1, -1), placed[1].view(1, -1), weight.view(1, -1))
    kept_cells = kept.to(device).flatten().index_select(0, cells)
    length = sum(counts) - int((prompt.valid & ~is_cell).sum())
    merged = compact(rows.unsqueeze(0), kept_cells.unsqueeze(0), length=length, merge=in_one_row.ordered())
    embeddings = project(merged.inputs_embeds[0]).to(inputs_embeds)
    places = cells.index_select(0, merged.source[0]).to(inputs_embeds.device)
    whole = inputs_embeds.flatten(0, 1).index_copy(0, places, embeddings)
    return torch.unflatten(whole, 0, inputs_embeds.shape[:2])
