"""What every vision encoder has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from hawk_kernels.hf.encoders.pieces import Piece

# Object layers of HiPrune (arXiv 2508.00553), counted from 1, by `model_type` and depth of the encoder.
_PUBLISHED = {("clip_vision_model", 24): 9, ("qwen2_5_vl", 32): 16}
_OBJECT_DEPTH = {"clip_vision_model": 9 / 24}
_USUAL_OBJECT_DEPTH = 16 / 32


class VisionEncoder(ABC):
    """The vision encoder inside a multimodal model.

    Args:
        multimodal: the model that holds the encoder and has `get_image_features`.
        tower: name of the encoder in it.

    Attributes:
        multimodal: the same.
        tower: the encoder itself.
        attentions: the attention module of each layer.
        depth: number of layers.
        deep_layer: the last layer that the visual tokens come from, counted from 1.
        default_object_layer: the layer that HiPrune finds objects in, counted from 1.
        object_layer_source: where that number comes from.
        projections: names of the modules in an attention module that make queries and keys; the first that is there of
            each group.

    Raises:
        TypeError: an encoder without the layers that this class reads.
    """

    projections: ClassVar[tuple[tuple[str, ...], ...]]

    def __init__(self, multimodal: Any, tower: str) -> None:
        self.multimodal: Any = multimodal
        self.tower: Any = getattr(multimodal, tower)
        self.attentions = _attentions(self.tower, [group[-1] for group in self.projections])
        self.depth = len(self.attentions)
        config = multimodal.config
        # VipLLaVA had a name of its own for it
        taken = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
        self.deep_layer = _deepest(taken, self.depth)
        kind = getattr(self.tower.config, "model_type", "").removesuffix("_vision")
        published = _PUBLISHED.get((kind, self.depth))
        fraction = _OBJECT_DEPTH.get(kind, _USUAL_OBJECT_DEPTH)
        self.default_object_layer = published or max(1, round(self.depth * fraction))
        self.object_layer_source = "arXiv 2508.00553" if published else f"{fraction:g} of {self.depth} layers"

    def projecting(self, layer: int) -> list[nn.Module]:
        """The modules of a layer, counted from 1, whose outputs are its queries and keys."""
        attention = self.attentions[layer - 1]
        return [
            getattr(attention, next(name for name in group if hasattr(attention, name))) for group in self.projections
        ]

    @abstractmethod
    def received(self, layer: int, projected: list[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        """Attention that each token of the encoder receives: the sum over query rows, mean over heads.

        The average is 1. Unlike the mean over rows it is comparable between windows and images of different sizes.

        Args:
            layer: counted from 1.
            projected: what the modules of `projecting` returned.
            arguments: those of the layer's attention module.
        """

    @abstractmethod
    def visual_tokens(
        self, kind: str, arguments: dict[str, Any], features: Any, received: torch.Tensor
    ) -> tuple[torch.Tensor, list[Piece]]:
        """From tokens of the encoder to visual tokens.

        Args:
            kind: "image" or "video".
            arguments: those of `get_image_features` or `get_video_features`.
            features: what that returned.
            received: float32 `[..., S]`, S statistics of each token of the encoder.

        Returns:
            float32 `[cells, S]` of the visual tokens that are cells, in the order of the features, and the pieces that
            all of them are.
        """


def _attentions(tower: nn.Module, projections: list[str]) -> list[nn.Module]:
    """The attention module of each layer: of the first list of layers that all have one with these projections."""
    for stack in tower.modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        found = [
            next((child for child in layer.children() if all(hasattr(child, name) for name in projections)), None)
            for layer in stack
        ]
        attentions = [attention for attention in found if attention is not None]
        if attentions and len(attentions) == len(found):
            return attentions
    raise TypeError(
        "method: expected one that leaves the vision encoder alone, as no layers with "
        f"{' and '.join(projections)} were found in this {type(tower).__name__}; use method='hawk'"
    )


def _deepest(feature_layer: int | list[int] | None, depth: int) -> int:
    """The deepest layer of those whose outputs are taken; 0 is what enters the first."""
    layers = [-1] if feature_layer is None else [feature_layer] if isinstance(feature_layer, int) else feature_layer
    return max(1, *(layer if layer >= 0 else depth + 1 + layer for layer in layers))
