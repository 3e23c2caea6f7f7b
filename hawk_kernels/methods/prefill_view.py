"""What a method may ask about a prompt when it chooses tokens, before the first layer or inside the stack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from hawk_kernels.layer import Layer


@dataclass(frozen=True)
class Segments:
    """The images (and videos) of a batch, each with a budget of its own.

    Attributes:
        index: int64 `[S, L]`, the places of a segment's tokens in the flattened `[B * M]` scores.
        mask: bool `[S, L]`, False where `index` is padding.
        kept_per_row: the most tokens that a row keeps in total (a host number, so that shapes need no sync).
    """

    index: torch.Tensor
    mask: torch.Tensor
    kept_per_row: int


@dataclass(frozen=True)
class EncoderAttention:
    """Attention that each visual token receives in two layers of the vision encoder, 1 on average over its tokens.

    Attributes:
        object: float32 `[B, M]`, in the object (middle) layer; finite but meaningless at padding.
        deep: float32 `[B, M]`, in the last layer that the visual tokens come from.
        grids: for each row, for each of its images, its grids `(t, h, w)`.
    """

    object: torch.Tensor
    deep: torch.Tensor
    grids: list[list[list[tuple[int, int, int]]]]


@dataclass(frozen=True)
class LocalAttention:
    """Attention of the vision encoder's CLS token in a shallow layer, and the grids that its visual tokens stand on.

    Attributes:
        attention: float32 `[B, M]`, as `PrefillView.cls_attention` gives it; finite but meaningless at padding.
        grids: for each row, for each of its images, its grids `(t, h, w)`.
        has_cls: whether the encoder has a CLS token; otherwise the attention is what each token receives.
    """

    attention: torch.Tensor
    grids: list[list[list[tuple[int, int, int]]]]
    has_cls: bool


@dataclass(frozen=True)
class LastQuery:
    """The query of the last token of each prompt and the keys of all tokens in one layer, after RoPE.

    Attributes:
        query: `[B, H, 1, D]`.
        keys: `[B, Hkv, T, D]`; a position that is not visible holds a copy of a visible one.
        visible: bool `[B, T]`, the tokens that the last one sees.
        visual: int64 `[B, M]`, where the visual tokens stand among the T; meaningless at padding.
        scale: what the layer multiplies the products by.
    """

    query: torch.Tensor
    keys: torch.Tensor
    visible: torch.Tensor
    visual: torch.Tensor
    scale: float


@dataclass(frozen=True)
class LayerAttention:
    """Queries and keys of all tokens of a batch in one layer, after RoPE, without padding: the rows follow each other.

    Attributes:
        queries: `[1, H, S, D]`.
        keys: `[1, Hkv, S, D]`.
        cu_seqlens: int32 `[R + 1]`, where each row that has tokens begins, and the end.
        text: int64 `[B, N]`, where the text queries stand among the S; meaningless at padding.
        visual: int64 `[B, M]`, where the visual tokens stand; meaningless at padding.
        scale: what the layer multiplies the products by.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    cu_seqlens: torch.Tensor
    text: torch.Tensor
    visual: torch.Tensor
    scale: float


@dataclass(frozen=True)
class HiddenStates:
    """The first layer's input and weights, from which `score_hidden` computes scores without projecting a token.

    Attributes:
        x: `[B, T, hidden]`, whole prompts.
        layer: what the layer does to them.
        q_mask: bool `[B, T]`, the text queries.
        k_mask: bool `[B, T]`, the visual tokens.
        visual: int64 `[B, M]`, where the visual tokens stand among the T; 0 at padding.
    """

    x: torch.Tensor
    layer: Layer
    q_mask: torch.Tensor
    k_mask: torch.Tensor
    visual: torch.Tensor


class PrefillView(ABC):
    """Tensors of one prefill, computed when a method first asks for them.

    Sizes: `B` rows, `M` visual tokens of the longest row, `N` text queries of the longest row, `H` query heads, `Hkv`
    key heads, `D` head dimension. Queries and keys are those of the first attention layer before RoPE.

    Attributes:
        candidates: bool `[B, M]`, True where a visual token stands; the rest is padding of shorter rows.
        head_weights: float32 `[H]`; only for a method that declares `uses_head_weights`.
        segments: None where a row has one budget, else its images.
    """

    candidates: torch.Tensor
    head_weights: torch.Tensor
    segments: Segments | None

    @abstractmethod
    def text_queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the queries of the text tokens `[B, H, N, D]` and which of them count, bool `[B, N]`."""

    @abstractmethod
    def mean_text_query(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return queries `[B, H, N', D]` whose masked mean is that of all text queries, and a mask `[B, N']` or None.

        If queries are an affine map of the normalised hidden state, averaging commutes with the map and `N'` is 1.
        """

    @abstractmethod
    def visual_keys(self) -> torch.Tensor:
        """Return the keys of the visual tokens `[B, Hkv, M, D]`; finite but meaningless where `candidates` is False."""

    def hidden_states(self) -> HiddenStates | None:
        """Return what `score_hidden` takes if queries and keys are linear in the normalised input; otherwise None.

        This is the cheapest way to scores by first-layer attention: no token is projected, copied or gathered.
        """
        return None

    @abstractmethod
    def visual_embeddings(self) -> torch.Tensor:
        """Return the visual tokens' embeddings `[B, M, hidden]`; finite but meaningless where `candidates` is False."""

    @abstractmethod
    def encoder_attention(self) -> EncoderAttention:
        """Return the attention inside the vision encoder; only for a method that declares `uses_encoder_attention`."""

    @abstractmethod
    def cls_attention(self) -> torch.Tensor:
        """Return the attention that the vision encoder's CLS token pays to each visual token, float32 `[B, M]`.

        It is the mean over heads of its row of the softmax in layer `cls_layer`, and over the patches that one visual
        token stands for. An encoder without a CLS token (SigLIP, the encoders of Qwen-VL) gives the attention that a
        token receives from all query rows of its image, tile or window, 1 on average: the mean over the rows, times
        their number, so that images of different sizes compare. Finite but meaningless at padding. Only for a method
        that declares `uses_cls_attention`.
        """

    def local_attention(self) -> LocalAttention:
        """Return what `cls_attention` gives, in the shallow layer `local_layer`, and where each visual token stands.

        Only for a method that declares `uses_local_attention`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not know shallow layers of the vision encoder")

    @abstractmethod
    def encoder_features(self) -> torch.Tensor:
        """Return what enters the projector for each visual token, `[B, M, C]`, in the encoder's dtype.

        Where the projector merges several patches into one visual token, their rows stand side by side: the merger of
        Qwen2.5-VL gets four of 1280 channels, so `C` is 5120. A family that interpolates embeddings, as LLaVA-OneVision
        does with videos, has its rows interpolated in the same way. Finite but meaningless at padding. Only for a
        method that declares `uses_encoder_features`.
        """

    def encoder_keys(self) -> torch.Tensor:
        """Return the keys of each visual token in layer `cls_layer` of the vision encoder, float32 `[B, M, H, D]`.

        They are those before any rotation by position, which says where a patch stands and not what it shows. Where
        several patches become one visual token, it is their mean. Finite but meaningless at padding. Only for a method
        that declares `uses_encoder_keys`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not know the keys of the vision encoder")

    @abstractmethod
    def text_keys(self) -> torch.Tensor:
        """Return the keys of the text tokens `[B, Hkv, N, D]`; finite but meaningless at padding."""

    @abstractmethod
    def text_embeddings(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embeddings of the text tokens `[B, N, hidden]` and which of them count, bool `[B, N]`."""

    @abstractmethod
    def rotated_text_queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `text_queries` after RoPE; only for a method that declares `uses_positions`."""

    @abstractmethod
    def rotated_visual_keys(self) -> torch.Tensor:
        """Return `visual_keys` after RoPE; only for a method that declares `uses_positions`."""

    @abstractmethod
    def last_query(self) -> LastQuery:
        """Return the last token and the keys of all tokens in the ranking layer; only inside the stack."""

    @abstractmethod
    def layer_attention(self) -> LayerAttention:
        """Return queries and keys of all tokens in the ranking layer; only inside the stack."""

    @abstractmethod
    def entered(self) -> PrefillView:
        """Return the view of the prompt as it enters the text model; this one before the first layer."""

    @abstractmethod
    def frames(self) -> list[list[list[tuple[int, int]]]]:
        """Return, for each row and each of its images, the grids `(h, w)` of its frames.

        Only for a method that declares `uses_grids`.
        """

    @abstractmethod
    def row_keys(self) -> list[int]:
        """Return a number for each row that depends on its own token ids only, not on padding or other rows."""
