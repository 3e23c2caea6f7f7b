"""What a method may see of a prompt before the first decoder layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


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
    """Attention that each visual token receives in two layers of the vision encoder, 1 on average.

    Attributes:
        object: float32 `[B, M]`, in the object (middle) layer; finite but meaningless at padding.
        deep: float32 `[B, M]`, in the last layer.
        grids: for each row, for each of its images (runs of visual tokens), its grids `(t, h, w)`.
    """

    object: torch.Tensor
    deep: torch.Tensor
    grids: list[list[list[tuple[int, int, int]]]]


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
        """Queries of the text tokens `[B, H, N, D]` and which of them count, bool `[B, N]`."""

    @abstractmethod
    def mean_text_query(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries `[B, H, N', D]` whose masked mean is that of all text queries, and their mask `[B, N']` or None.

        Where queries are an affine map of the normalised hidden state, averaging commutes with it and `N'` is 1.
        """

    @abstractmethod
    def visual_keys(self) -> torch.Tensor:
        """Keys of the visual tokens `[B, Hkv, M, D]`; finite but meaningless where `candidates` is False."""

    @abstractmethod
    def visual_embeddings(self) -> torch.Tensor:
        """Embeddings of the visual tokens `[B, M, hidden]`; finite but meaningless where `candidates` is False."""

    @abstractmethod
    def encoder_attention(self) -> EncoderAttention:
        """Attention inside the vision encoder; only for a method that declares `uses_encoder_attention`."""
