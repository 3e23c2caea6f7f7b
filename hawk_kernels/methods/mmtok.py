"""MMTok: the tokens that cover the question and the picture best (arXiv 2508.18264)."""

from __future__ import annotations

import torch

from hawk_kernels.methods.base import JointMethod, candidates_of_units, of_rows, of_units, product, register
from hawk_kernels.methods.prefill_view import PrefillView
from hawk_kernels.ops.select_topk import select_topk
from hawk_kernels.selection import Selection, kept_counts, max_kept
from hawk_kernels.validation import check_rounding


@register
class MMTok(JointMethod):
    """Keeps the visual tokens that together cover the text tokens and all visual tokens best.

    With embeddings `v[i]` of the `n` visual and `t[j]` of the `m` text tokens and rows `x[i]` that enter the projector,
    `P[j, i] = softmax_i(cos(t[j], v[i]) / 0.02) / m` and `Q[k, i] = softmax_i(cos(x[k], x[i]) / 0.2) / n`. The kept set
    `S` maximises `sum_j max_S P[j, i] + 0.5 sum_k max_S Q[k, i]`, greedily: each pick is the token that adds most (Dong
    et al., "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026, arXiv 2508.18264, and
    the code of its authors).

    The release drops common words from the question for LLaVA, and takes the temperature 0.01 for text with Qwen-VL;
    here the text is that of `prune(query=...)`. It leaves out the padding of LLaVA-1.5's square pictures, which
    transformers does not mark. Equal gains go to the lower index. Memory grows with the square of the number of visual
    tokens, and each pick reads all of it.

    Args:
        alpha: weight of the cover of the visual tokens, at least 0.
        text_temperature: of the softmax for text tokens, above 0.
        vision_temperature: of the softmax for visual tokens, above 0.
        rounding: "floor", "ceil" or "nearest" (half to even).

    Raises:
        TypeError, ValueError: an option that is none of these.
    """

    name = "mmtok"
    summary = "Keeps the tokens that together cover the question and the whole image best."
    paper = "2508.18264"
    signal = "embeddings of the image and of the text; features of the vision encoder"
    uses_text = True
    uses_encoder_features = True

    def __init__(
        self,
        alpha: float = 0.5,
        text_temperature: float = 0.02,
        vision_temperature: float = 0.2,
        rounding: str = "floor",
    ) -> None:
        self.alpha = _checked("alpha", alpha, 0, False, "0.5")
        self.text_temperature = _checked("text_temperature", text_temperature, 0, True, "0.02")
        self.vision_temperature = _checked("vision_temperature", vision_temperature, 0, True, "0.2")
        check_rounding(rounding)
        self.rounding = rounding

    def select(self, view: PrefillView, r: float | int) -> Selection:
        candidates = candidates_of_units(view)
        embeddings, features = (of_units(x, view) for x in (view.visual_embeddings(), view.encoder_features()))
        text, text_mask = view.text_embeddings()
        if view.segments is not None:
            row = view.segments.index[:, 0] // view.candidates.shape[1]
            text, text_mask = text[row], text_mask[row]
        finite = embeddings.isfinite().all(dim=-1) & features.isfinite().all(dim=-1)
        counted = candidates & finite
        of_vision, of_text = _unit(embeddings, counted), _unit(text, text_mask)
        of_encoder = _unit(features, counted)
        words = _cover(product(of_text, of_vision.transpose(1, 2)), text_mask, counted, self.text_temperature)
        picture = _cover(product(of_encoder, of_encoder.transpose(1, 2)), counted, counted, self.vision_temperature)
        cover = torch.cat([words, self.alpha * picture], dim=1)
        budget = kept_counts(r, candidates.sum(dim=1, keepdim=True), self.rounding)
        picked, gains = greedy_coverage(cover, counted, budget, max_kept(r, candidates.shape[1], self.rounding))
        # a budget beyond the finite tokens takes others too, in their order
        kept = select_topk(picked.float(), r, mask=candidates, rounding=self.rounding)
        scores = gains.masked_fill(~finite, torch.nan).masked_fill(~candidates, -torch.inf)
        return of_rows(Selection(kept.mask, kept.indices, scores), view)


def greedy_coverage(
    cover: torch.Tensor, candidates: torch.Tensor, budget: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick columns greedily so that the sum over rows of the largest picked entry grows most.

    Args:
        cover: float32 `[U, R, L]`, at least 0; overwritten.
        candidates: bool `[U, L]`, the columns that may be picked.
        budget: int64 `[U, 1]`, how many are picked, at most the candidates.
        most: the largest budget.

    Returns:
        bool `[U, L]`, the picked columns; and float32 `[U, L]`, what a column added when it was picked or, if it was
        not, would add now. Equal gains go to the lower index.
    """
    picked, gains = torch.zeros_like(candidates), cover.sum(dim=1)
    for turn in range(most):
        best = gains.masked_fill(picked | ~candidates, -1).argmax(dim=1, keepdim=True)
        takes = (turn < budget) & (candidates & ~picked).gather(1, best)
        column = cover.gather(2, best.unsqueeze(2).expand(-1, cover.shape[1], 1))
        # what is covered adds nothing more
        cover.sub_(column.masked_fill_(~takes.unsqueeze(2), 0)).clamp_(min=0)
        picked = picked.scatter(1, best, takes | picked.gather(1, best))
        gains = torch.where(picked, gains, cover.sum(dim=1))
    return picked, gains


def _cover(cosine: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, temperature: float) -> torch.Tensor:
    """Tell how much of each row each column covers, float32 `[U, R, L]`: in sum 1 over rows that count, else 0."""
    share = torch.softmax((cosine / temperature).masked_fill(~columns.unsqueeze(1), -torch.inf), dim=2)
    # a unit without columns has no shares
    share = share.nan_to_num_(nan=0.0).masked_fill_(~rows.unsqueeze(2), 0)
    return share / rows.sum(dim=1).clamp(min=1).view(-1, 1, 1)


def _unit(tokens: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Scale tokens `[U, L, C]` to length 1, in float32; 0 where they do not count or are not finite."""
    tokens = tokens.float()
    known = counted & tokens.isfinite().all(dim=-1)
    return torch.nn.functional.normalize(tokens.masked_fill(~known.unsqueeze(-1), 0), dim=-1)


def _checked(name: str, value: object, least: float, is_open: bool, published: str) -> float:
    """Return an option as a float: at least `least`, or above it where `is_open`."""
    expected = f"{name}: expected a number {'>' if is_open else '>='} {least:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{expected}, got {type(value).__name__}; the paper takes {published}")
    if not (value > least if is_open else value >= least):
        raise ValueError(f"{expected}, got {value}; the paper takes {published}")
    return float(value)
