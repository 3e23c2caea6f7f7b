"""`with prune(model, keep_ratio): ...`: whatever runs inside reads fewer visual tokens, by forward hooks alone."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hawk_kernels.head_weights import resolve_head_weights
from hawk_kernels.hf.anatomy import dissect
from hawk_kernels.hf.choose_tokens import Chooser
from hawk_kernels.hf.hooks import forget_compiled_call
from hawk_kernels.hf.prefill import CallHooks, Outcome
from hawk_kernels.hf.question import ChatQuestion, Query
from hawk_kernels.hf.stats import PruningStats, PruningTotals, sample_stats
from hawk_kernels.methods import Method, resolve_method
from hawk_kernels.validation import checked_keep_ratio

if TYPE_CHECKING:
    from hawk_kernels.compile_ahead import WarmUp

BUDGETS = ("shared", "per_image")


def prune(
    model: nn.Module,
    keep_ratio: float | int,
    *,
    method: str | Method = "hawk",
    head_weights: str | Path | torch.Tensor | list[float] | None = None,
    budget: str = "shared",
    query: Query | None = None,
    **options: Any,
) -> Pruning:
    """Prune the visual tokens of every prompt that `model` reads inside a `with` block (HAWK, arXiv 2604.07812).

        with prune(model, keep_ratio=0.2) as pruning:
            out = model.generate(**inputs)   # same call, same slicing of `out`

    This works for `generate` and for `model(**inputs)`. Logits keep the length of the prompt; those of dropped tokens
    come from a hidden state of zeros, so that `labels` and slicing stay right. `hidden_states` and `attentions` of the
    output are those of the tokens that stayed. A cache that was filled inside the block must be continued inside a
    block. Without a cache, a call whose prompt is the previous one and one more token, about the same images, counts as
    the next step of a generation and keeps the tokens of the first step; several such generations may take turns.

    Nothing is pruned before the block is entered: `prune(...)` alone only checks its arguments. A block in which the
    model was not called says so by a warning on leaving. A generation that another thread began inside the block, or
    was given `model.generate` for, is pruned to its end; the hooks stay for that thread alone until then. A cache that
    was pruned refuses new tokens outside a block, and so do its copies.

    Inside the block `save_pretrained` and `state_dict` save the model as outside; `copy.deepcopy`, `pickle` and
    `torch.save(model)` raise a TypeError, since a copy would carry the hooks and no block of its own would end them.

    Args:
        model: a transformers model of a supported family (docs/families.md), as it is or inside a `PeftModel`, a
            `DistributedDataParallel` or what `torch.compile(model)` returns.
        keep_ratio: float in (0, 1], the fraction of the visual tokens that is kept, at least one; or an int, how many.
            A row with fewer tokens than that keeps them all, as in `score_and_select` with a mask.
        method: name of a method, or a method object.
        head_weights: None (the shipped registry), "uniform", a `[H]` tensor or sequence, or the path of a weights file.
        budget: "shared" by all images of a row, or "per_image": `keep_ratio` applies to each image or video.
        query: the text that ranks the visual tokens: a bool mask `[B, T]`, a callable from `input_ids` to one, or a
            processor or tokenizer, whose chat template shows where the user's last turn stands. By default it is the
            text after the last image up to the final end of turn or, where several turns stand there, the user's last.
        **options: the method's own, such as `normalize="l2"` and `rounding="floor"` of "hawk".

    Returns:
        A context manager that shows what happened: `keep_mask`, `scores`, `query_mask`, `stats`, `totals`.

    Raises:
        TypeError: a model that is not supported, an unknown option, or an argument of another type.
        ValueError: a value out of range, or a model whose head weights are not known.
    """
    pruning = Pruning(model, keep_ratio, method, head_weights, budget, query, options)
    if keep_ratio == 1 and not isinstance(keep_ratio, float):
        warnings.warn("keep_ratio: the int 1 keeps a single visual token; the float 1.0 keeps all", stacklevel=2)
    return pruning


class Pruning:
    """The `with` block that `prune` returns, which also shows what happened to the last prompt inside it.

    The results are those of the last prefill in the calling thread, or of any thread where this one has had none.
    Inside `generate` only the prompt that it was called with counts. The results are None before the first prefill, and
    stay after the block. Their rows are those that the model saw: `generate`
    repeats a sample for its beams and return sequences. The object can be entered again.
    """

    def __init__(
        self,
        model: nn.Module,
        keep_ratio: float | int,
        method: str | Method,
        head_weights: Any,
        budget: str,
        query: Query | None,
        options: dict[str, Any],
    ) -> None:
        self._anatomy = dissect(model)
        keep_ratio = checked_keep_ratio("keep_ratio", keep_ratio)
        method = resolve_method(method, options)
        if budget not in BUDGETS:
            raise ValueError(
                f"budget: expected 'shared' or 'per_image', got {budget!r}; keep_ratio sets how many tokens stay"
            )
        query = _checked_query(query)
        weights, source = None, None
        if method.uses_head_weights:
            heads = self._anatomy.projections.num_heads
            weights, source = resolve_head_weights(head_weights, self._anatomy.head.config, heads)
        elif head_weights is not None:
            raise TypeError(f"head_weights: method {method.name!r} uses none; leave the argument out")
        self._method = method
        self._per_image = budget == "per_image"
        self._chooser = Chooser(method, keep_ratio, self._per_image, weights)
        self._query = query
        self._hooks = self._made_hooks()
        self._no_stats = PruningStats(
            model=type(self._anatomy.head).__name__,
            family=self._anatomy.family.model_type,
            method=method.name,
            method_options=self._hooks.options(),
            head_weights=source,
            keep_ratio=keep_ratio,
            budget=budget,
        )
        self._was_compiled = False
        self._thread = _ThreadState()
        self._latest: Outcome | None = None
        self._totals = PruningTotals()
        self._adding = threading.Lock()

    @property
    def keep_mask(self) -> torch.Tensor | None:
        """Mark the tokens of the prompt that stayed, bool `[B, T]`; False means dropped or padding."""
        return None if self._outcome is None else self._outcome.keep_mask

    @property
    def scores(self) -> torch.Tensor | None:
        """Return the importance of each visual token, float32 `[B, T]`, `-inf` where nothing was scored."""
        return None if self._outcome is None else self._outcome.scores

    @property
    def query_mask(self) -> torch.Tensor | None:
        """Mark the text tokens that ranked the visual ones, bool `[B, T]`."""
        return None if self._outcome is None else self._outcome.query_mask

    @property
    def stats(self) -> PruningStats:
        """Tell sample by sample how many tokens came and stayed, with which budget, and why any were left alone."""
        outcome = self._outcome
        if outcome is None:
            return self._no_stats
        reason, prompt = outcome.reason, outcome.prompt
        samples = () if prompt is None else sample_stats(prompt, outcome.budgets, self._per_image, reason)
        return replace(self._no_stats, samples=samples, reason=reason)

    @property
    def totals(self) -> PruningTotals:
        """Tell sums over all prompts so far, of all threads and blocks of this object."""
        return self._totals

    def overlay(self, image: Any, *, row: int = 0, processor: Any = None, title: str | None = None) -> Any:
        """Draw the last prompt: its pictures with the dropped tokens dimmed, and with the scores as heat.

        Args:
            image: what the processor got for the row: a PIL image; a list of them in the order of the prompt; a video
                as a list of frames or an array `[frames, height, width, 3]`; a list with videos in it.
            row: of the batch, as the model saw it.
            processor: the one that made the inputs; tells how it cuts pictures where that is a setting of its own.
            title: a line above the pictures, say the question.

        Returns:
            a PIL image.

        Raises:
            ValueError: nothing was pruned yet, another number of pictures, or one that cannot be the encoded one.
            TypeError: `image` is no picture.
        """
        from hawk_kernels.pictures.pruned import overlay

        return overlay(self._pruned_prompt, image, row=row, processor=processor, title=title)

    def report(
        self,
        path: str | Path,
        image: Any = None,
        *,
        row: int = 0,
        processor: Any = None,
        timings: Mapping[str, float] | None = None,
    ) -> Path:
        """Write the last prompt as one HTML page without references to anything outside it.

        Args:
            path: of the page; replaces an earlier report, and nothing else.
            image: as for `overlay`; without it the page shows the tokens alone.
            row: of the batch, as the model saw it.
            processor: the one that made the inputs, or a tokenizer; tells what was asked.
            timings: seconds by name, shown as they are.

        Returns:
            the path.

        Raises:
            ValueError: as for `overlay`, or a path that holds something else than a report.
            OSError: the page cannot be written; what was there before stays.
        """
        from hawk_kernels.pictures.report import write_report

        return write_report(self._pruned_prompt, path, image, row=row, processor=processor, timings=timings)

    def warm_up(self, *, max_tokens: int = 262144, max_batch: int = 64, progress: bool = True) -> WarmUp:
        """Compile ahead every kernel that a prompt can need, before the block is entered or inside it.

        See `hawk_kernels.warm_up`, which takes the arguments of `prune` and does the same.

        Args:
            max_tokens: the most tokens in a row of a batch.
            max_batch: the most rows.
            progress: whether a bar shows how far it is.

        Returns:
            What was compiled. On a CPU and in Triton's interpreter nothing is, and its notes say so.

        Raises:
            TypeError, ValueError: a bound that is not an int of at least 1.
        """
        from hawk_kernels.hf.warm_up import warm_up_pruning

        return warm_up_pruning(self._anatomy, self._chooser, max_tokens, max_batch, progress)

    @property
    def _pruned_prompt(self) -> Any:
        from hawk_kernels.pictures.pruned import PrunedPrompt

        outcome = self._outcome
        if outcome is None or outcome.prompt is None or not outcome.prompt.visual.any():
            return None
        prompt, encoded = outcome.prompt, outcome.encoded
        return PrunedPrompt(self._anatomy, prompt, encoded, outcome.keep_mask, outcome.scores, self.stats, self._method)

    def __enter__(self) -> Pruning:
        was_compiled = "_compiled_call" in vars(self._anatomy.head)
        # an adapter may have replaced projections since the object was made
        self._anatomy = dissect(self._anatomy.head)
        hooks = self._made_hooks()
        hooks.lifetime.open()
        self._hooks, self._was_compiled = hooks, was_compiled
        return self

    def __exit__(self, *exception: object) -> None:
        hooks = self._hooks
        ended = hooks.lifetime.close()
        if exception[0] is not None:
            return
        if hooks.all_nan is not None and bool(hooks.all_nan):
            raise hooks.nan_error()
        if ended and not hooks.lifetime.was_called:
            warnings.warn(
                "prune: the model was not called inside the block, so nothing was pruned; put the call inside the "
                "`with`, and join there the threads that make it",
                stacklevel=2,
            )
        if hooks.left_images_alone and not hooks.has_chosen:
            warnings.warn(
                "prune: images came inside the block and none was pruned, since they came over a cache that was not "
                "empty; start with a new cache, or pass all images in the first call",
                stacklevel=2,
            )
        if hooks.tiny_budget and self._chooser.keep_ratio != 1:
            warnings.warn(
                f"keep_ratio: a budget of {self._chooser.keep_ratio} kept less than 1 % of {hooks.tiny_budget} visual "
                "tokens; a float in (0, 1] is the fraction kept",
                stacklevel=2,
            )

    def _made_hooks(self) -> CallHooks:
        return CallHooks(self._anatomy, self._chooser, self._query, self._publish, self._ended, self._add_seconds)

    def _ended(self) -> None:
        if not self._was_compiled:
            forget_compiled_call(self._anatomy.head)

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.stats!r}"

    @property
    def _outcome(self) -> Outcome | None:
        return self._thread.outcome or self._latest

    def _publish(self, outcome: Outcome) -> None:
        earlier = self._thread.outcome
        self._thread.outcome = self._latest = outcome
        if outcome.prompt is None:
            return
        counts = _counts(outcome)
        if earlier is not None and earlier.prompt is outcome.prompt:
            # a later word on the same prompt takes the place of the earlier one
            counts -= _counts(earlier)
        self._add(*counts.tolist(), 0.0)

    def _add_seconds(self, seconds: float) -> None:
        self._add(0, 0, 0, 0, 0, 0, seconds)

    def _add(self, *counts: float) -> None:
        with self._adding:
            so_far = self._totals
            sums = (getattr(so_far, name) + more for name, more in zip(vars(so_far), counts, strict=True))
            self._totals = PruningTotals(*sums)


class _ThreadState(threading.local):
    outcome: Outcome | None = None


def _counts(outcome: Outcome) -> np.ndarray:
    """Count what a prompt adds to the totals, int64 `[6]`, in the order of the fields of `PruningTotals`."""
    prompt, budgets = outcome.prompt, outcome.budgets
    assert prompt is not None
    rows, visual, tokens = len(prompt.ids), int(prompt.visual.sum()), int(prompt.valid[:, : prompt.length].sum())
    kept = visual if budgets is None else sum(map(sum, budgets))
    return np.array([1, rows, visual, kept, tokens, tokens - visual + kept])


def _checked_query(query: Any) -> Query | None:
    if hasattr(query, "apply_chat_template"):
        return ChatQuestion(query)
    if query is None or callable(query) or isinstance(query, torch.Tensor):
        checked: Query | None = query
        return checked
    raise TypeError(
        f"query: expected a bool mask [B, T], a callable or a processor, got {type(query).__name__}; "
        "use torch.as_tensor, or leave it out for the text after the last image"
    )
