"""Random inputs of a case, and the float64 scores that every contender is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import csrc_ref
from bench.cases import Case
from hawk_kernels import Layer

# Tokens of text before the image and after the question, which are not scored.
_BEFORE, _AFTER = 15, 5


@dataclass(frozen=True)
class Scores:
    """Scores `[B, M]` that came from elsewhere."""

    scores: torch.Tensor

    def expected(self, case: Case) -> torch.Tensor:
        return self.scores.double()


@dataclass(frozen=True)
class QueriesAndKeys:
    """Queries `q [B, H, N, D]`, keys `k [B, Hkv, M, D]` and head importance `w [H]`."""

    q: torch.Tensor
    k: torch.Tensor
    w: torch.Tensor

    def expected(self, case: Case) -> torch.Tensor:
        q, k, w = (tensor.double() for tensor in (self.q, self.k, self.w))
        scores: torch.Tensor = csrc_ref.score_tokens(q, k, w, normalize=case.normalize)
        return scores


@dataclass(frozen=True)
class HiddenStates:
    """The input of the first decoder layer, `x [B, T, C]`: text, image, question, text."""

    x: torch.Tensor
    layer: Layer
    w: torch.Tensor
    queries: slice
    visual: slice

    def to(self, device: torch.device) -> HiddenStates:
        """Copy the numbers to another device."""
        return HiddenStates(self.x.to(device), self.layer.to(device), self.w.to(device), self.queries, self.visual)

    @property
    def q_mask(self) -> torch.Tensor:
        """bool `[B, T]`."""
        return self._mask(self.queries)

    @property
    def k_mask(self) -> torch.Tensor:
        """bool `[B, T]`."""
        return self._mask(self.visual)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `score_hidden` and `score_hidden_and_select` that these inputs determine."""
        masks = {"q_mask": self.q_mask, "k_mask": self.k_mask}
        return {"x": self.x, "layer": self.layer, "w": self.w, **masks}

    def _mask(self, positions: slice) -> torch.Tensor:
        mask = torch.zeros(self.x.shape[:2], dtype=torch.bool, device=self.x.device)
        mask[:, positions] = True
        return mask

    def expected(self, case: Case) -> torch.Tensor:
        layer = self.layer.to(torch.float64)
        head_dim = layer.wq.shape[0] // self.w.shape[0]
        q, k = (
            projected(_rms_norm(self.x[:, positions].double(), layer), weight, bias, head_dim)
            for positions, weight, bias in ((self.queries, layer.wq, layer.bq), (self.visual, layer.wk, layer.bk))
        )
        scores: torch.Tensor = csrc_ref.score_tokens(q, k, self.w.double(), normalize=case.normalize)
        everywhere = scores.new_full(self.x.shape[:2], -torch.inf)
        everywhere[:, self.visual] = scores
        return everywhere


def projected(normalized: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head_dim: int) -> torch.Tensor:
    """Project `[B, T, C]` to the heads of a layer, `[B, heads, T, D]`."""
    heads = torch.nn.functional.linear(normalized, weight, bias)
    return torch.unflatten(heads, -1, (-1, head_dim)).transpose(1, 2)


def _rms_norm(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    normalized = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + layer.norm_eps)
    return normalized if layer.norm_weight is None else normalized * layer.norm_weight


Inputs = Scores | QueriesAndKeys | HiddenStates


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw the inputs of a case; a kind of device always gets the same numbers."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * scale).to(case.torch_dtype)

    decoder, batch = case.decoder, case.batch
    num_heads, num_key_value_heads, head_dim = decoder.num_heads, decoder.num_key_value_heads, decoder.head_dim
    if case.kind == "scores":
        return Scores(torch.randn(batch, case.num_keys, generator=generator, device=device))
    w = torch.rand(num_heads, generator=generator, device=device)
    if case.kind == "queries":
        q = random(batch, num_heads, case.num_queries, head_dim)
        return QueriesAndKeys(q, random(batch, num_key_value_heads, case.num_keys, head_dim), w)
    hidden = decoder.hidden_size
    layer = Layer(
        norm_weight=1 + random(hidden, scale=0.1),
        norm_eps=1e-6,
        wq=random(num_heads * head_dim, hidden, scale=hidden**-0.5),
        bq=random(num_heads * head_dim, scale=0.1),
        wk=random(num_key_value_heads * head_dim, hidden, scale=hidden**-0.5),
        bk=random(num_key_value_heads * head_dim, scale=0.1),
        num_key_value_heads=num_key_value_heads,
    )
    visual = slice(_BEFORE, _BEFORE + case.num_keys)
    queries = slice(visual.stop, visual.stop + case.num_queries)
    x = random(batch, queries.stop + _AFTER, hidden)
    return HiddenStates(x, layer, w, queries, visual)
