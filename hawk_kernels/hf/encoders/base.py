"""Defines what all vision encoders have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import nn

from hawk_kernels.hf.encoders.pieces import Piece

# object layers of HiPrune (arXiv 2508.00553), counted from 1, by `model_type` and depth of the encoder
_PUBLISHED = {("clip_vision_model", 24): 9, ("qwen2_5_vl", 32): 16}
_OBJECT_DEPTH = {"clip_vision_model": 9 / 24}
_USUAL_OBJECT_DEPTH = 16 / 32
# what CLIP and InternViT call the embedding of the CLS token
_CLS_TOKENS = ("class_embedding", "cls_token")


class VisionEncoder(ABC):
    """The vision encoder inside a multimodal model.

    Args:
        multimodal: the model that holds the encoder and has `get_image_features`.
        tower: name of the encoder in it.
        projector: path in `multimodal` of the module that turns the encoder's rows into embeddings.

    Attributes:
        multimodal: the same.
        tower: the encoder itself.
        projector: the module that turns the encoder's rows into embeddings, each row by itself or each group of rows
            that become one visual token.
        attentions: the attention module of each layer.
        depth: number of layers.
        deep_layer: the last layer that the visual tokens come from, counted from 1.
        default_object_layer: the layer that HiPrune finds objects in, counted from 1.
        object_layer_source: where that number comes from.
        default_local_layer: the shallow layer of VScan's local scan, counted from 1.
        has_cls: whether the encoder sees a CLS token before the patches.
        projections: names of the modules in an attention module that make queries and keys; in each group the first
            name that the attention module has counts.

    Raises:
        TypeError: an encoder without the layers that this class reads.
    """

    projections: ClassVar[tuple[tuple[str, ...], ...]]

    def __init__(self, multimodal: Any, tower: str, projector: str) -> None:
        self.multimodal: Any = multimodal
        self.tower: Any = getattr(multimodal, tower)
        self.projector: nn.Module = multimodal.get_submodule(projector)
        self.attentions = _attentions(self.tower, [group[-1] for group in self.projections])
        self.depth = len(self.attentions)
        config = multimodal.config
        # VipLLaVA had a name of its own for it
        taken = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
        self.deep_layer = _deepest(taken, self.depth)
        self.has_cls = any(name.endswith(_CLS_TOKENS) for name, _ in self.tower.named_parameters())
        kind = getattr(self.tower.config, "model_type", "")
        self.default_object_layer, self.object_layer_source = usual_object_layer(kind, self.depth)
        # layer 6 of 24 in CLIP and 8 of 32 in Qwen2.5-VL (arXiv 2505.22654)
        self.default_local_layer = min(self.deep_layer, max(1, round(self.depth / 4)))

    def projecting(self, layer: int) -> list[nn.Module]:
        """Return the modules whose outputs are a layer's queries and keys; layers count from 1."""
        attention = self.attentions[layer - 1]
        return [
            getattr(attention, next(name for name in group if hasattr(attention, name))) for group in self.projections
        ]

    @abstractmethod
    def received(self, layer: int, projected: list[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        """Measure the attention that each token of the encoder receives: the sum over query rows, mean over heads.

        It is 1 on average. Unlike the mean over rows, it is comparable between windows and images of different sizes.

        Args:
            layer: counted from 1.
            projected: what the modules of `projecting` returned.
            arguments: those of the layer's attention module.
        """

    def from_cls(self, layer: int, projected: list[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        """Measure the attention that the CLS token pays to each token of the encoder, mean over heads.

        An encoder without a CLS token is measured as in `received`, where all query rows count.

        Args:
            layer, projected, arguments: as in `received`.
        """
        return self.received(layer, projected, arguments)

    @abstractmethod
    def keys(self, layer: int, projected: list[torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        """Return the keys of each token of the encoder before they are rotated by position, float32 `[..., H, D]`.

        Args:
            layer, projected, arguments: as in `received`.
        """

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """Run the projector on rows of visual tokens as `visual_rows` lays them out, `[K, C]` to `[K, hidden]`."""
        projected: torch.Tensor = self.projector(rows)
        return projected

    @abstractmethod
    def visual_tokens(
        self, kind: str, arguments: dict[str, Any], features: Any, received: torch.Tensor
    ) -> tuple[torch.Tensor, list[Piece]]:
        """Turn statistics of the encoder's tokens into statistics of visual tokens.

        Args:
            kind: "image" or "video".
            arguments: those of `get_image_features` or `get_video_features`.
            features: what that returned.
            received: float32 `[..., S]`, S statistics of each token of the encoder.

        Returns:
            The statistics of the visual tokens that are cells, float32 `[cells, S]`, in the order of the features; and
            the pieces that all visual tokens form.
        """

    @abstractmethod
    def visual_rows(
        self, kind: str, arguments: dict[str, Any], features: Any, entering: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[Piece]]:
        """Lay out what entered the projector, one row for each visual token.

        Where several rows of the encoder become one visual token, they stand side by side in its row, in the order of
        the projector or, where that merges squares of patches itself, row by row of the square.

        Args:
            kind, arguments, features: as in `visual_tokens`.
            entering: what entered each call of the projector, `[..., C']`.

        Returns:
            The rows of the visual tokens that are cells, `[cells, C]`, in the order of the features; and the pieces
            that all visual tokens form.
        """


def usual_object_layer(model_type: str, depth: int) -> tuple[int, str]:
    """Find the layer that HiPrune finds objects in, counted from 1, and say where that number comes from.

    Args:
        model_type: of the encoder's config.
        depth: number of its layers.
    """
    kind = model_type.removesuffix("_vision")
    published = _PUBLISHED.get((kind, depth))
    if published is not None:
        return published, "arXiv 2508.00553"
    fraction = _OBJECT_DEPTH.get(kind, _USUAL_OBJECT_DEPTH)
    return max(1, round(depth * fraction)), f"{fraction:g} of {depth} layers"


def _attentions(tower: nn.Module, projections: list[str]) -> list[nn.Module]:
    """Find the attention module of each layer, in the first list of layers that all have these projections."""
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
        "method: expected one that leaves the vision encoder alone, got one that reads it, and this "
        f"{type(tower).__name__} has no layers with {' and '.join(projections)}; use method='hawk'"
    )


def _deepest(feature_layer: int | list[int] | None, depth: int) -> int:
    """Find the deepest of the layers whose outputs are taken; 0 stands for what enters the first."""
    layers = [-1] if feature_layer is None else [feature_layer] if isinstance(feature_layer, int) else feature_layer
    return max(1, *(layer if layer >= 0 else depth + 1 + layer for layer in layers))
