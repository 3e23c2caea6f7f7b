"""The contenders: ours, the release, the same compiled, a strong PyTorch baseline, and other libraries' kernels.

flash-colreduce is not among them: it averages a softmax over the keys, HAWK the logits before one, so the two keep
other tokens. `bench.attention_column_mean` holds it against ours on the statistic that both compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

import hawk_kernels
from bench.cases import KEEP_RATIO, Case
from bench.inputs import HiddenStates, Inputs, QueriesAndKeys, Scores, projected
from bench.parity import Parity, check_kept, check_selection
from bench.released import released_steps, released_steps_from_hidden
from hawk_kernels import Layer, Selection

OURS, RELEASED, STRONG = "ours", "released steps", "strong PyTorch"
# What computing in the inputs' dtype may cost, relative to the largest score.
_ROUNDING = {"bf16": 3e-2, "fp16": 4e-3, "fp32": 2e-5}


@dataclass(frozen=True)
class Contender:
    """One way from a case's inputs to the kept tokens.

    Attributes:
        name: in tables.
        run: returns a Selection or kept indices `[B, K]`.
        tolerance: of its parity.
        first: the position that its index 0 stands for.
    """

    name: str
    run: Callable[[], Selection | torch.Tensor]
    tolerance: float
    first: int = 0

    def check(self, expected: torch.Tensor) -> Parity:
        """Compare with float64 scores; raises `ParityError`, or what the call raises."""
        kept = self.run()
        if isinstance(kept, torch.Tensor):
            return check_kept(kept + self.first, expected, self.tolerance)
        candidates = torch.isfinite(expected)
        mask = None if candidates.all() else candidates
        error = check_selection(kept, expected, KEEP_RATIO, mask=mask, tolerance=self.tolerance)
        count = int(kept.mask[0].sum())
        found = check_kept(kept.indices[:, :count], expected, self.tolerance)
        return Parity(max(error, found.error), found.differing)


def strong_steps(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor, r: float, normalize: str | None) -> torch.Tensor:
    """Select as good PyTorch code does: average q first, one product in the dtype of the inputs, top-k, sort."""
    batch, num_heads, _, head_dim = q.shape
    num_groups = k.shape[1]
    mean = q.mean(dim=2) * head_dim**-0.5
    if normalize is None:
        # without a norm between them, the heads of a group fold into one query
        mean = (mean * w.to(mean.dtype)[:, None]).view(batch, num_groups, -1, head_dim).sum(dim=2, keepdim=True)
        importance = torch.matmul(mean, k.transpose(-1, -2)).float().sum(dim=(1, 2))
    else:
        c = torch.matmul(mean.view(batch, num_groups, -1, head_dim), k.transpose(-1, -2))
        c = torch.nan_to_num(c.view(batch, num_heads, -1).float(), nan=0.0, posinf=0.0, neginf=0.0)
        weights = w.float().expand(batch, -1)
        if normalize == "l2":
            weights = weights / (c.norm(dim=-1) + 1e-6)
        elif normalize == "softmax":
            c = c.softmax(dim=-1)
        else:
            weights = weights / (c.amax(dim=-1) - c.amin(dim=-1) + 1e-6)
        importance = torch.bmm(weights[:, None, :], c)[:, 0]
    return top_k_sorted(importance, r)


def strong_projections(inputs: HiddenStates) -> tuple[torch.Tensor, torch.Tensor]:
    """Project `q [B, H, 1, D]` of the averaged text and `k [B, Hkv, M, D]` of the visual tokens alone."""
    x, layer = inputs.x, inputs.layer
    text, visual = (_norm(x[:, positions], layer) for positions in (inputs.queries, inputs.visual))
    head_dim = layer.wq.shape[0] // inputs.w.shape[0]
    q = projected(text.mean(dim=1, keepdim=True), layer.wq, layer.bq, head_dim)
    return q, projected(visual, layer.wk, layer.bk, head_dim)


def top_k_sorted(scores: torch.Tensor, r: float) -> torch.Tensor:
    """Return ascending indices by `torch.topk`."""
    return scores.topk(max(1, math.floor(r * scores.shape[1])), dim=1).indices.sort(dim=1).values


def contenders(case: Case, inputs: Inputs) -> list[Contender]:
    """Return the contenders that can run this case here."""
    if isinstance(inputs, Scores):
        return _from_scores(inputs)
    if isinstance(inputs, QueriesAndKeys):
        return _from_queries(case, inputs)
    return _from_hidden(case, inputs)


def _from_scores(inputs: Scores) -> list[Contender]:
    scores = inputs.scores
    count = max(1, math.floor(KEEP_RATIO * scores.shape[1]))
    found = [
        Contender(OURS, lambda: hawk_kernels.select_topk(scores, KEEP_RATIO), 0.0),
        Contender("torch.topk, sort", lambda: top_k_sorted(scores, KEEP_RATIO), 0.0),
        Contender(
            "torch.sort (stable)",
            lambda: scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values,
            0.0,
        ),
    ]
    if scores.device.type == "cuda" and find_spec("flashinfer") is not None:
        import flashinfer

        found += [
            Contender("FlashInfer top_k, unordered", lambda: flashinfer.top_k(scores, count)[1], 0.0),
            Contender("FlashInfer top_k, sort", lambda: flashinfer.top_k(scores, count)[1].sort(dim=1).values, 0.0),
        ]
    return found


def _from_queries(case: Case, inputs: QueriesAndKeys) -> list[Contender]:
    q, k, w, mode, rounding = inputs.q, inputs.k, inputs.w, case.normalize, _ROUNDING[case.dtype]
    found = [
        Contender(OURS, lambda: hawk_kernels.score_and_select(q, k, w, KEEP_RATIO, normalize=mode), 4e-6),
        Contender(RELEASED, lambda: released_steps(q, k, w, KEEP_RATIO, mode), rounding),
        Contender(STRONG, lambda: strong_steps(q, k, w, KEEP_RATIO, mode), rounding),
    ]
    if case.compiled:
        released, strong = (torch.compile(steps, dynamic=False) for steps in (released_steps, strong_steps))
        found += [
            Contender(f"{RELEASED}, compiled", lambda: released(q, k, w, KEEP_RATIO, mode), rounding),
            Contender(f"{STRONG}, compiled", lambda: strong(q, k, w, KEEP_RATIO, mode), rounding),
        ]
    return found


def _from_hidden(case: Case, inputs: HiddenStates) -> list[Contender]:
    x, layer, w, mode, rounding = inputs.x, inputs.layer, inputs.w, case.normalize, _ROUNDING[case.dtype]
    arguments = inputs.arguments

    def ours() -> Selection:
        return hawk_kernels.score_hidden_and_select(**arguments, r=KEEP_RATIO, normalize=mode)

    def from_projections() -> torch.Tensor:
        return hawk_kernels.score_and_select(*strong_projections(inputs), w, KEEP_RATIO, normalize=mode).indices

    def strong() -> torch.Tensor:
        return strong_steps(*strong_projections(inputs), w, KEEP_RATIO, mode)

    def released(steps: Callable[..., torch.Tensor] = released_steps_from_hidden) -> torch.Tensor:
        return steps(x, layer, w, inputs.queries, inputs.visual, KEEP_RATIO, mode)

    first = inputs.visual.start
    found = [
        # against float64 of the half-precision weights: nothing is rounded on the way
        Contender(OURS, ours, 1e-5),
        Contender("ours, keys projected", from_projections, rounding, first),
        Contender(RELEASED, released, rounding, first),
        Contender(STRONG, strong, rounding, first),
    ]
    if case.compiled:
        steps = torch.compile(released_steps_from_hidden, dynamic=False)
        found.append(Contender(f"{RELEASED}, compiled", lambda: released(steps), rounding, first))
    return found


def _norm(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], layer.norm_weight, layer.norm_eps)
