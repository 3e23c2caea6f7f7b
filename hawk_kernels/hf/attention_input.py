"""Computes what enters the first attention layer of a text model whose first layers have no attention.

Hybrid models begin with layers of linear attention or convolutions. The first attention layer ranks the visual tokens,
and it reads what these layers make of them, not the embeddings.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from hawk_kernels.hf.anatomy import Anatomy, first_attention_layer


@torch.no_grad()
def input_of_first_attention(anatomy: Anatomy, arguments: dict[str, Any]) -> torch.Tensor:
    """Run the layers before the first one with attention on a whole prompt, without a cache.

    The text model makes the masks and positions of its layers itself, so its own forward runs, on a shallow copy that
    ends where attention begins. The model itself is not touched, since other threads may be using it.

    Args:
        anatomy: the model's parts.
        arguments: those of the text model for the whole prompt.

    Returns:
        What enters the first attention layer, `[B, T, hidden]`.
    """
    text: Any = anatomy.text
    index, layer = first_attention_layer(text)
    end = _End(layer)
    start: Any = copy.copy(text)
    start._modules = {**text._modules, "layers": nn.ModuleList([*list(text.layers)[:index], end])}
    # what the caller wants from the whole model must not be collected twice
    without = {"past_key_values": None, "use_cache": False, "output_hidden_states": False, "output_attentions": False}
    router = {"output_router_logits": False} if "output_router_logits" in arguments else {}
    # the function of the class, since accelerate may have bound a forward to the text model itself
    inspect.getattr_static(type(text), "forward")(start, **{**arguments, **without, **router})
    assert end.states is not None
    return end.states


class _End(nn.Module):
    """Stands in place of a layer, keeps what enters it, and hands that on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.states: torch.Tensor | None = None
        # some text models ask a layer for its kind before they call it
        self._facts = {name: value for name, value in vars(layer).items() if isinstance(value, (str, int, bool))}

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("_facts", {})
        return facts[name] if name in facts else super().__getattr__(name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.states = hidden_states
        return hidden_states
