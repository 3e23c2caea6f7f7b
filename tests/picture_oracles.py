"""Which visual tokens a part of a picture becomes, found without the package: by an encoder without attention."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

# what processors set around and between tiles
FAKE, GLOBAL, BREAK, NEWLINE, NEXT_COLUMN, NEXT_ROW, FIRST_TILE = 110, 111, 112, 113, 114, 115, 60

Size = tuple[int, int]
Box = tuple[int, int, int, int]


@contextmanager
def without_attention(tower: nn.Module) -> Iterator[None]:
    """Inside, attention of the tower adds nothing: every patch then only changes the token that it becomes."""

    def silent(module: nn.Module, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    attentions = [module for module in tower.modules() if type(module).__name__.endswith("Attention")]
    handles = [module.register_forward_hook(silent) for module in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def features(model: Any, kind: str, inputs: dict[str, Any]) -> torch.Tensor:
    """What the encoder makes of the processor's output, `[tokens, hidden]`, tokens of all entries in order."""
    base = model.base_model
    encode = getattr(base, f"get_{kind}_features")
    accepted = inspect.signature(encode).parameters
    # some encoders read the padding of the largest sample
    with torch.no_grad(), without_attention(base):
        told = {name: value for name, value in inputs.items() if name in accepted}
        output = encode(**told, return_dict=True)
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        pooled = base.multi_modal_projector(output.last_hidden_state)
    if isinstance(pooled, torch.Tensor):
        return pooled.reshape(-1, pooled.shape[-1])
    return torch.cat([entry.reshape(-1, entry.shape[-1]) for entry in pooled])


def changed_tokens(model: Any, kind: str, before: dict[str, Any], after: dict[str, Any]) -> np.ndarray:
    """Which tokens differ, bool `[tokens]`."""
    difference = (features(model, kind, after) - features(model, kind, before)).abs().amax(dim=-1).float()
    return (difference > 2e-3 * difference.max()).numpy()


def blank(size: Size) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", size, (120, 120, 120))


def painted(size: Size, box: Box) -> Image.Image:
    """The same with another colour in a box."""
    picture = blank(size)
    picture.paste((250, 10, 60), box)
    return picture
