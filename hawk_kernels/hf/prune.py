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
from hawk_kernels.hf.anatomy import Anatomy, dissect
from hawk_kernels.hf.call_state import Outcome
from hawk_kernels.hf.choose_tokens import Chooser
from hawk_kernels.hf.hooks import forget_compiled_call
from hawk_kernels.hf.packing import check_renumbers
from hawk_kernels.hf.prefill import CallHooks
from hawk_kernels.hf.question import NAMED_QUERIES, ChatQuestion, Query
from hawk_kernels.hf.stats import PruningStats, PruningTotals, Stage, sample_stats
from hawk_kernels.methods import Method, resolve_method
from hawk_kernels.validation import checked_keep_ratio

if TYPE_CHECKING:
    from hawk_kernels.compile_ahead import WarmUp

BUDGETS = ("shared", "per_image", "per_tile")
POSITIONS = ("original", "packed")
KeepRatio = float | int | Mapping[int, float | int | tuple[str | Method, float | int]]
"""How much is kept: of all visual tokens, or stage by stage."""


class Default(str):
    """The default of an argument: it equals its string, but can be told from the same string passed by a caller."""

    __slots__ = ()


DEFAULT_METHOD, _SHARED, _ORIGINAL = Default("hawk"), Default("shared"), Default("original")


def prune(
    model: nn.Module,
    keep_ratio: KeepRatio,
    *,
    method: str | Method = DEFAULT_METHOD,
    head_weights: str | Path | torch.Tensor | list[float] | None = None,
    budget: str = _SHARED,
    query: Query | None = None,
    mode: str | None = None,
    positions: str = _ORIGINAL,
    recipe: str | None = None,
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
            A row with fewer tokens than that keeps them all, as in `score_and_select` with a mask. Or stages
            `{layer: keep}` or `{layer: (method, keep)}`: after this layer, counted from 1, that much of the original
            visual tokens is left; layer 0 stands for before the first. Some methods have stages of their own, such as
            "fastv" after layer 2.
        method: name of a method, or a method object; None means "hawk".
        head_weights: None (the shipped registry), "uniform", a `[H]` tensor or sequence, or the path of a weights file.
        budget: "shared" (the same as None) by all images of a row; "per_image": `keep_ratio` applies to each image or
            video; "per_tile": to each tile of a picture, where the family cuts pictures into tiles. There image
            newlines belong to no tile's budget and stay.
        query: the text that ranks the visual tokens: a bool mask `[B, T]`, a callable from `input_ids` to one, or a
            processor or tokenizer, whose chat template shows where the user's last turn stands. By default it is the
            text after the last image up to the final end of turn or, where several turns stand there, the user's last.
            "release" takes all turns that stand there, as the release of HAWK does.
        mode: what becomes of tokens that leave after a layer: "drop" takes them out of the sequence and the cache,
            "hide" masks them for later layers, which computes the same and saves nothing. None leaves it to the method;
            all of the package's drop. Tokens that leave before the first layer are always dropped.
        positions: "original" (the same as None): the tokens that stay keep their position ids; "packed": they are
            numbered anew, as in a prompt that never had the others, which is what releases for LLaVA do. For tokens
            that leave before the first layer, in families whose position ids do not tell rows and columns.
        recipe: name of a recipe, such as "divprune-release", which sets the method, its options, `budget`, `query` and
            `positions` as the authors' release does; what you pass yourself takes precedence. docs/methods.md lists
            them.
        **options: the method's own, such as `normalize="l2"` and `rounding="floor"` of "hawk".

    Returns:
        A context manager that shows what happened: `keep_mask`, `scores`, `query_mask`, `stats`, `totals`.

    Raises:
        TypeError: a model that is not supported, an unknown option, or an argument of another type.
        ValueError: a value out of range, or a model whose head weights are not known.
    """
    if recipe is not None:
        from hawk_kernels.recipes import followed

        given: dict[str, Any] = {"method": method, "budget": budget, "query": query, "positions": positions}
        said = {name: None if isinstance(value, Default) else value for name, value in given.items()}
        said, options = followed(recipe, said, options)
        method, budget, query, positions = (given[name] if said[name] is None else said[name] for name in given)
    pruning = Pruning(
        model,
        keep_ratio,
        method,
        head_weights,
        budget,
        query,
        mode,
        positions,
        options,
    )
    if keep_ratio == 1 and not isinstance(keep_ratio, float):
        warnings.warn("keep_ratio: the int 1 keeps a single visual token; the float 1.0 keeps all", stacklevel=2)
    return pruning


class Pruning:
    """The `with` block that `prune` returns, which also shows what happened to the last prompt inside it.

    The results are those of the last prefill in the calling thread, or of any thread where this one has had none.
    Inside `generate` only the prompt that it was called with counts. The results are None before the first prefill, and
    stay after the block. Their rows are those that the model saw: `generate` repeats a sample for its beams and return
    sequences. The object can be entered again.
    """

    def __init__(
        self,
        model: nn.Module,
        keep_ratio: KeepRatio,
        method: str | Method,
        head_weights: Any,
        budget: str,
        query: Query | None,
        mode: str | None,
        positions: str,
        options: dict[str, Any],
    ) -> None:
        self._anatomy = dissect(model)
        stages, self._mode = stages_of(self._anatomy, keep_ratio, method, mode, options)
        if budget not in BUDGETS:
            raise ValueError(
                f"budget: expected 'shared' or 'per_image' or 'per_tile', got {budget!r}; keep_ratio sets how many "
                "tokens stay"
            )
        if budget == "per_tile":
            from hawk_kernels.hf.tiles import check_tiles

            check_tiles(self._anatomy)
        _check_positions(positions, self._anatomy, stages)
        query = _checked_query(query)
        weights, source = self._head_weights(stages, head_weights)
        self._budget, self._positions = budget, positions
        self._per_image = budget != "shared"
        self._choosers = {stage.layer: Chooser(stage.method, stage.keep, self._per_image, weights) for stage in stages}
        self._stages, self._last = stages, stages[-1]
        self._query = query
        self._hooks = self._made_hooks()
        keep_of_last = self._last.keep
        assert isinstance(keep_of_last, (float, int))
        of_last = self._hooks.options() if self._last.layer == 0 else {}
        self._no_stats = PruningStats(
            model=type(self._anatomy.head).__name__,
            family=self._anatomy.family.model_type,
            method=self._last.method.name,
            method_options={**self._last.method.options(), **of_last},
            head_weights=source,
            keep_ratio=keep_of_last,
            budget=budget,
            mode=self._mode,
            positions=positions,
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
        """Report for each sample how many tokens came and stayed, with which budget, and why any were left alone."""
        outcome, stages = self._outcome, tuple(stage.stats() for stage in self._stages)
        if outcome is None:
            return replace(self._no_stats, stages=stages)
        reason, prompt = outcome.reason, outcome.prompt
        text: Any = self._anatomy.text
        by_stage = dict(zip(self._choosers, outcome.by_stage, strict=False))
        samples = (
            ()
            if prompt is None
            else sample_stats(prompt, outcome.budgets, self._per_image, reason, by_stage, len(text.layers))
        )
        saved = outcome.cache_bytes_saved
        return replace(self._no_stats, samples=samples, reason=reason, stages=stages, cache_bytes_saved=saved)

    @property
    def totals(self) -> PruningTotals:
        """Return sums over all prompts so far, of all threads and blocks of this object."""
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
            TypeError: `image` is not a picture.
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

        return warm_up_pruning(self._anatomy, self._choosers, max_tokens, max_batch, progress)

    @property
    def _pruned_prompt(self) -> Any:
        from hawk_kernels.pictures.pruned import PrunedPrompt

        outcome = self._outcome
        if outcome is None or outcome.prompt is None or not outcome.prompt.visual.any():
            return None
        prompt, encoded, method = outcome.prompt, outcome.encoded, self._last.method
        return PrunedPrompt(self._anatomy, prompt, encoded, outcome.keep_mask, outcome.scores, self.stats, method)

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
            raise hooks.nan_error(self._last.method.name)
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
        if hooks.tiny_budget and self._last.keep != 1:
            warnings.warn(
                f"keep_ratio: a budget of {self._last.keep} kept less than 1 % of {hooks.tiny_budget} visual "
                "tokens; a float in (0, 1] is the fraction kept",
                stacklevel=2,
            )

    def _made_hooks(self) -> CallHooks:
        inside = None
        if self._last.layer:
            from hawk_kernels.hf.inside_stack import InnerStage, InsideStack

            later = (InnerStage(layer, chooser) for layer, chooser in self._choosers.items() if layer)
            inside = InsideStack(self._anatomy, tuple(later), self._mode)
        before = self._choosers.get(0)
        renumbers = self._positions == "packed"
        return CallHooks(
            self._anatomy,
            before,
            inside,
            self._budget,
            renumbers,
            self._query,
            self._publish,
            self._ended,
            self._add_seconds,
        )

    def _head_weights(self, stages: tuple[Stage, ...], given: Any) -> tuple[torch.Tensor | None, str | None]:
        """Return the head weights that the methods read, and where they come from."""
        reading = [stage for stage in stages if stage.method.uses_head_weights]
        if not reading:
            if given is not None:
                names = ", ".join(dict.fromkeys(repr(stage.method.name) for stage in stages))
                raise TypeError(f"head_weights: method {names} uses none; leave the argument out")
            return None, None
        inner = [stage.layer for stage in reading if stage.layer]
        if inner and given is None:
            raise ValueError(
                f"head_weights: expected those of layer {inner[0] + 1} for the stage after layer {inner[0]}, got None; "
                "the shipped weights are those of the first layer, so pass head_weights='uniform' or a tensor"
            )
        return resolve_head_weights(given, self._anatomy.head.config, self._anatomy.projections.num_heads)

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
            # a later report of the same prompt replaces the earlier one
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


def stages_of(
    anatomy: Anatomy, keep_ratio: KeepRatio, method: str | Method, mode: str | None, options: dict[str, Any]
) -> tuple[tuple[Stage, ...], str]:
    """Return the stages of a pruning, ascending, and what becomes of tokens inside the stack."""
    if isinstance(keep_ratio, Mapping):
        from hawk_kernels.hf.stages import checked_mode, named_stages

        stages = named_stages(keep_ratio, method, options)
        return stages, checked_mode(mode, stages)
    keep_ratio = checked_keep_ratio("keep_ratio", keep_ratio)
    method = resolve_method(method, options)
    text: Any = anatomy.text
    by_layer = method.stages(keep_ratio, len(text.layers))
    stages = tuple(Stage(layer, method.at_layer(layer), keep) for layer, keep in sorted(by_layer.items()))
    if mode is None and list(by_layer) == [0]:
        return stages, "drop"
    from hawk_kernels.hf.stages import checked_mode

    return stages, checked_mode(mode, stages)


def _check_positions(positions: str, anatomy: Anatomy, stages: tuple[Stage, ...]) -> None:
    if positions not in POSITIONS:
        raise ValueError(
            f"positions: expected 'original' or 'packed', got {positions!r}; 'packed' numbers the tokens that stay anew"
        )
    if positions == "original":
        return
    check_renumbers(anatomy)
    last = stages[-1].layer
    if last:
        raise ValueError(
            f"positions: expected 'original' with tokens that leave after layer {last}, got 'packed'; the layers up to "
            "there have cached the keys of these tokens at their positions, so leave the argument out"
        )


def _counts(outcome: Outcome) -> np.ndarray:
    """Count what a prompt adds to the totals, int64 `[6]`, in the order of the fields of `PruningTotals`."""
    prompt, budgets = outcome.prompt, outcome.budgets
    assert prompt is not None
    rows, visual, tokens = len(prompt.ids), int(prompt.visual.sum()), int(prompt.valid[:, : prompt.length].sum())
    kept = visual if budgets is None else sum(map(sum, budgets))
    return np.array([1, rows, visual, kept, tokens, tokens - visual + kept])


def _checked_query(query: Any) -> Query | None:
    if isinstance(query, str):
        if query in NAMED_QUERIES:
            return query
        known = ", ".join(map(repr, NAMED_QUERIES))
        raise ValueError(
            f"query: expected {known}, a bool mask [B, T], a callable or a processor, got {query!r}; leave it out for "
            "the text after the last image"
        )
    if hasattr(query, "apply_chat_template"):
        return ChatQuestion(query)
    if query is None or callable(query) or isinstance(query, torch.Tensor):
        checked: Query | None = query
        return checked
    raise TypeError(
        f"query: expected 'release', a bool mask [B, T], a callable or a processor, got {type(query).__name__}; "
        "use torch.as_tensor, or leave it out for the text after the last image"
    )
