"""Tells what other keep ratios would have kept, where the scores of the prompt that was read tell it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.methods import Hawk, Method
from hawk_kernels.ranking import order_key, rank

_SHARES = (0.01, 0.02, *(share / 20 for share in range(1, 21)))


@dataclass(frozen=True)
class Step:
    """One place of the slider.

    Attributes:
        label: the keep ratio, for people.
        share: of the visual tokens that it keeps.
        counts: tokens kept of each unit; empty where only the selection that ran is known.
        ran: whether this is what ran.
    """

    label: str
    share: float
    counts: list[int]
    ran: bool = False


@dataclass(frozen=True)
class Selections:
    """What a row keeps at each of several keep ratios.

    Attributes:
        unit: int64 `[T]`, which budget a token counts against, -1 for none.
        rank: int64 `[T]`, its place in that budget's order, 0 for the highest score.
        steps: ascending by what they keep.
        why_one: why only the ratio that ran can be shown, or None.
    """

    unit: np.ndarray
    rank: np.ndarray
    steps: list[Step]
    why_one: str | None = None


def selections(
    prompt: Prompt,
    row: int,
    kept: np.ndarray,
    scores: np.ndarray,
    method: Method,
    keep_ratio: float | int,
    per_image: bool,
) -> Selections:
    """Make the selections of a row at the ratio that ran and at others.

    Args:
        prompt: the batch on the host.
        row: of the batch.
        kept: bool `[T]`, what stayed.
        scores: float32 `[T]`.
        method: what chose.
        keep_ratio: that ran.
        per_image: whether each image, or each tile of a prompt that knows its tiles, had a budget of its own.
    """
    visual = prompt.visual[row]
    units = prompt.units(row) if per_image else [np.flatnonzero(visual)]
    units = [unit for unit in units if len(unit)]
    unit_of, rank_of = np.full(len(visual), -1), np.full(len(visual), len(visual))
    for number, places in enumerate(units):
        unit_of[places] = number
        key = order_key(torch.from_numpy(scores[places].astype(np.float32))[None], None)
        rank_of[places] = rank(key)[0].numpy()
    share = float(kept[visual].mean()) if visual.any() else 1.0
    ran = Step(_label(keep_ratio), share, [method.kept_count(keep_ratio, len(places)) for places in units], ran=True)
    why = _why_one(method, unit_of, rank_of, ran, kept, visual)
    if why is not None:
        return Selections(unit_of, rank_of, [Step(ran.label, share, [], ran=True)], why)
    total = int(visual.sum())
    steps = [ran]
    for ratio in _SHARES:
        counts = [method.kept_count(ratio, len(places)) for places in units]
        if sum(counts) not in {sum(step.counts) for step in steps}:
            steps.append(Step(_label(ratio), sum(counts) / total, counts))
    return Selections(unit_of, rank_of, sorted(steps, key=lambda step: sum(step.counts)))


def _why_one(
    method: Method, unit_of: np.ndarray, rank_of: np.ndarray, ran: Step, kept: np.ndarray, visual: np.ndarray
) -> str | None:
    # Hawk selects inside its kernel, by the same order
    if type(method).select not in (Method.select, Hawk.select):
        return (
            f"{method.name} chooses tokens together, so its scores do not tell what it would keep at another ratio. "
            "Run it again with that ratio to see."
        )
    counts = np.array([*ran.counts, 0])
    if not np.array_equal((rank_of < counts[unit_of])[visual], kept[visual]):
        return "What was kept is not what the scores alone would keep, so no other ratio is shown."
    return None


def _label(ratio: float | int) -> str:
    if isinstance(ratio, int):
        return f"{ratio} tokens"
    return f"{100 * ratio:.4g} %"
