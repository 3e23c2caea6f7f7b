"""Describes what pruning did to a prompt, for people and for logs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from hawk_kernels.hf.prompt import Prompt
from hawk_kernels.methods import Method
from hawk_kernels.methods.base import Falling, Keep


class Stage(NamedTuple):
    """Says after which layer how much of the original visual tokens stays, and which method chooses it.

    Attributes:
        layer: the last layer that sees what the stage drops, counted from 1; 0 stands for before the first.
        method: chooses the tokens that stay.
        keep: the fraction of the original visual tokens that stays, how many, or a number on the way to that.
    """

    layer: int
    method: Method
    keep: Keep

    def stats(self) -> StageStats:
        """Return the same for statistics."""
        keep = str(self.keep) if isinstance(self.keep, Falling) else self.keep
        return StageStats(self.layer, self.method.name, self.method.options(), keep)


@dataclass(frozen=True)
class StageStats:
    """One stage of a pruning.

    Attributes:
        layer: the last layer that sees what the stage drops, counted from 1; 0 stands for before the first.
        method: name of its method.
        method_options: the options that the method was made with.
        keep: the fraction of the original visual tokens that stays, or how many; in words for a number on the way to a
            budget.
    """

    layer: int
    method: str
    method_options: dict[str, Any]
    keep: float | int | str


@dataclass(frozen=True)
class SampleStats:
    """What happened to one row of a batch.

    Attributes:
        visual_tokens_before: visual tokens of the prompt.
        visual_tokens_after: visual tokens that stayed.
        prompt_tokens_before: tokens of the prompt without padding.
        prompt_tokens_after: tokens of the prompt that stayed, without padding.
        budget: how many visual tokens the row may keep.
        budget_per_image: how many each of its images (or tiles, where these have budgets) may keep, or None where the
            images share one budget.
        query_tokens: text tokens that ranked the visual ones.
        query_source: where these text tokens were found.
        reason: why nothing was dropped, or None.
        visual_tokens_by_layer: visual tokens that each layer of the text model reads.
    """

    visual_tokens_before: int
    visual_tokens_after: int
    prompt_tokens_before: int
    prompt_tokens_after: int
    budget: int
    budget_per_image: list[int] | None
    query_tokens: int
    query_source: str
    reason: str | None
    visual_tokens_by_layer: tuple[int, ...] = ()


@dataclass(frozen=True)
class PruningStats:
    """What happened in the last prefill, sample by sample.

    Attributes:
        model: class of the model.
        family: its `model_type`.
        method: name of the method; that of the last stage.
        method_options: the options that the method was made with.
        head_weights: where the head weights come from, or None for a method without head weights.
        keep_ratio: fraction kept, or the budget; that of the last stage.
        budget: "shared", "per_image" or "per_tile".
        mode: "drop" or "hide", what becomes of tokens that leave inside the stack.
        positions: "original" or "packed", the position ids of the tokens that stayed.
        stages: after which layers tokens leave.
        cache_bytes_saved: bytes by which the cache of the whole batch was smaller, after the prompt, than without
            pruning; 0 for a cache of fixed size; None without a cache, or where its layers do not tell.
        samples: one entry for each row; empty before the first prefill.
        reason: why the whole call was left alone, or None.
    """

    model: str
    family: str
    method: str
    method_options: dict[str, Any]
    head_weights: str | None
    keep_ratio: float | int
    budget: str
    mode: str = "drop"
    positions: str = "original"
    stages: tuple[StageStats, ...] = ()
    cache_bytes_saved: int | None = None
    samples: tuple[SampleStats, ...] = field(default=())
    reason: str | None = "no prompt has been read yet"

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain dicts, lists, strings and numbers, ready for JSON."""
        samples, stages = [asdict(sample) for sample in self.samples], [asdict(stage) for stage in self.stages]
        return {**asdict(self), "samples": samples, "stages": stages}

    def __repr__(self) -> str:
        heads = f", head weights: {self.head_weights}" if self.head_weights else ""
        lines = [
            f"PruningStats({self.model}, {self.method}, keep_ratio={self.keep_ratio}, budget={self.budget}{heads})"
        ]
        if any(stage.layer for stage in self.stages):
            verb = "drops all but" if self.mode == "drop" else "hides all but"
            lines += [f"  {_place(stage.layer)}: {stage.method} {verb} {_kept(stage.keep)}" for stage in self.stages]
        if self.cache_bytes_saved:
            lines.append(f"  cache smaller by {self.cache_bytes_saved} bytes")
        if self.reason:
            lines.append(f"  left alone: {self.reason}")
        for row, sample in enumerate(self.samples):
            line = (
                f"  sample {row}: visual tokens {sample.visual_tokens_before} -> {sample.visual_tokens_after}, "
                f"prompt tokens {sample.prompt_tokens_before} -> {sample.prompt_tokens_after}, "
                f"{sample.query_tokens} query tokens ({sample.query_source})"
            )
            lines.append(f"{line}; {sample.reason}" if sample.reason and not self.reason else line)
        return "\n".join(lines)


def _place(layer: int) -> str:
    return f"after layer {layer}" if layer else "before layer 1"


def _kept(keep: float | int | str) -> str:
    """Say in words what stays; a method may use words of its own."""
    if isinstance(keep, str):
        return keep
    return f"{keep:.4g} of the visual tokens" if isinstance(keep, float) else f"{keep} visual tokens"


@dataclass(frozen=True)
class PruningTotals:
    """Running sums over the prompts that a `Pruning` has read, in all threads, since it was made.

    Each prompt counts once, when its tokens are chosen: steps after the prompt, and further prompts inside one
    `generate`, do not count. Images over a cache that is not empty are left alone and do not count either.

    Attributes:
        prompts: calls of the model, or of `generate`, that brought a prompt.
        rows: rows of these batches.
        visual_tokens_before: visual tokens of the prompts.
        visual_tokens_after: visual tokens that stayed.
        prompt_tokens_before: tokens of the prompts without padding.
        prompt_tokens_after: tokens of the prompts that stayed, without padding.
        choosing_seconds: seconds that choosing and packing before the first layer took on the host, of all calls. On a
            GPU that is the time until its work is queued: measuring it there would make every prompt wait.
    """

    prompts: int = 0
    rows: int = 0
    visual_tokens_before: int = 0
    visual_tokens_after: int = 0
    prompt_tokens_before: int = 0
    prompt_tokens_after: int = 0
    choosing_seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain numbers, ready for JSON."""
        return asdict(self)


def sample_stats(
    prompt: Prompt,
    budgets: list[list[int]] | None,
    per_image: bool,
    reason: str | None,
    by_stage: dict[int, list[list[int]]],
    depth: int,
) -> tuple[SampleStats, ...]:
    """Make the statistics of each row of a batch.

    Args:
        prompt: the batch on the host.
        budgets: visual tokens kept, for each row a list with one entry for each image or a single one for the row;
            None means all.
        per_image: whether the budgets are those of images.
        reason: why nothing was dropped at all, or None.
        by_stage: the budgets of each stage, by the layer after which it begins.
        depth: layers of the text model.
    """
    samples = []
    for row in range(len(prompt.ids)):
        visual, tokens = int(prompt.visual[row].sum()), int(prompt.valid[row, : prompt.length].sum())
        kept = visual if budgets is None else sum(budgets[row])
        if reason is None and visual == 0:
            why: str | None = "no visual tokens"
        elif reason is None and kept == visual:
            why = "the budget covers every visual token"
        else:
            why = reason
        by_layer = [visual] * depth
        for layer, of_stage in sorted(by_stage.items()):
            by_layer[layer:] = [sum(of_stage[row])] * (depth - layer)
        samples.append(
            SampleStats(
                visual_tokens_before=visual,
                visual_tokens_after=kept,
                prompt_tokens_before=tokens,
                prompt_tokens_after=tokens - visual + kept,
                budget=kept,
                budget_per_image=list(budgets[row]) if budgets is not None and per_image else None,
                query_tokens=int(prompt.query[row].sum()),
                query_source=prompt.query_sources[row],
                reason=why,
                visual_tokens_by_layer=tuple(by_layer),
            )
        )
    return tuple(samples)
