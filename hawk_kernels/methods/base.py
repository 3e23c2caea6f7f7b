"""The class that every pruning method derives from, the names that `prune` knows, and what methods share."""

from __future__ import annotations

import inspect
import numbers
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch

from hawk_kernels.backends.choose import without_autocast
from hawk_kernels.merge_checks import check_entries, check_merge
from hawk_kernels.methods.prefill_view import PrefillView, Segments
from hawk_kernels.ops.attention_column_mean import attention_column_mean
from hawk_kernels.ops.select_topk import select_topk
from hawk_kernels.selection import Merge, Selection, kept_count
from hawk_kernels.validation import as_written


class Method(ABC):
    """Scores the visual tokens of a prompt and chooses those that stay.

    A method keeps exactly `kept_count(r, M_b)` tokens of a row (or of each image, with segments): all later shapes are
    computed from that number on the host, without waiting for the device. Decorate a class with `register` to let
    `prune` know it by its name; an object of a class that is not registered works as well.

    Attributes:
        name: what `prune(method=...)` calls it.
        summary: what it keeps, in one sentence that begins with a verb and ends with a full stop.
        paper: the arXiv id of its paper, or None.
        signal: what it looks at, a few words.
        uses_head_weights: whether it reads `PrefillView.head_weights`.
        uses_text: whether a row with visual tokens must have text queries.
        uses_encoder_attention: whether it calls `PrefillView.encoder_attention`, of the layer `object_layer`.
        uses_cls_attention: whether it calls `PrefillView.cls_attention`.
        cls_layer: the encoder layer of that attention, counted from 1; None means the last one that the visual tokens
            come from, which in LLaVA is the layer before the last.
        uses_local_attention: whether it calls `PrefillView.local_attention`.
        local_layer: the encoder layer of that attention, counted from 1; None means the last of its first
            quarter.
        uses_encoder_features: whether it calls `PrefillView.encoder_features`.
        uses_encoder_keys: whether it calls `PrefillView.encoder_keys`, of the layer `cls_layer`.
        stage: where the merge map of its selections applies: "decoder" adds up the embeddings that enter the first
            layer, "encoder" the rows that enter the projector, which then runs on the sums. The two differ where the
            projector is not linear. Without a map a kept token has the same embedding either way.
        uses_grids: whether it calls `PrefillView.frames`.
        uses_positions: whether it asks for queries and keys after RoPE.
        uses_key_lengths: whether it ranks by the L2 norms of keys, which some models make equal.
        inside_only: whether it reads the attention of a layer, and so can only choose inside the stack.
        reads_layer: whether it asks for queries or keys, so that the layer that ranks must have attention.
        mode: "drop" or "hide", what happens to the tokens that a stage inside the stack does not keep: they leave the
            sequence and the cache, or stay there and are masked for the layers after it. Both compute the same.
        ranks_by: which layer a stage after layer K asks, whose `view` the method then sees: the "next" one, K + 1,
            before it runs, as before the first layer; or the "last" one that sees every token, K.
        stage_options: names of options that only say what `stages` returns.
        rounding: "floor", "ceil" or "nearest" (half to even), how a keep ratio becomes a number of tokens.
    """

    name: str
    summary: str = ""
    paper: str | None = None
    signal: str = ""
    uses_head_weights: bool = False
    uses_text: bool = False
    uses_encoder_attention: bool = False
    object_layer: int | None = None
    uses_cls_attention: bool = False
    cls_layer: int | None = None
    uses_local_attention: bool = False
    local_layer: int | None = None
    uses_encoder_features: bool = False
    uses_encoder_keys: bool = False
    stage: str = "decoder"
    uses_grids: bool = False
    uses_positions: bool = False
    uses_key_lengths: bool = False
    inside_only: bool = False
    reads_layer: bool = True
    mode: str = "drop"
    ranks_by: str = "next"
    stage_options: tuple[str, ...] = ()
    rounding: str = "floor"

    @abstractmethod
    def score(self, view: PrefillView) -> torch.Tensor:
        """Return the importance of each visual token, float32 `[B, M]`; `-inf` where `view.candidates` is False."""

    def select(self, view: PrefillView, r: float | int) -> Selection:
        """Choose the tokens that stay: those with the highest scores of each row, or of each of its images."""
        scores = checked_scores(self.name, self.score(view), view.candidates)
        if view.segments is not None:
            return select_in_segments(scores, r, view.segments, self.rounding)
        return select_topk(scores, r, mask=view.candidates, rounding=self.rounding)

    def stages(self, keep_ratio: float | int, depth: int) -> dict[int, Keep]:
        """Say after which layers of a text model tokens are dropped, where the caller names none.

        Args:
            keep_ratio: what the caller wants to be left in the end.
            depth: layers of the text model.

        Returns:
            For each layer, counted from 1, how much of the original visual tokens stays after it; layer 0 stands for
            before the first.
        """
        return {0: keep_ratio}

    def at_layer(self, layer: int) -> Method:
        """Return the method that chooses after a layer, counted from 1; layer 0 stands for before the first.

        This is the method itself, unless it ranks by other things inside the stack than before it. The other object
        has the same name.
        """
        return self

    def kept_count(self, r: float | int, num_candidates: int) -> int:
        """Return how many of `num_candidates` tokens `select` keeps."""
        return kept_count(r, num_candidates, self.rounding)

    def reads_encoder(self) -> bool:
        """Tell whether the vision encoder must be watched."""
        uses = (
            self.uses_encoder_attention,
            self.uses_cls_attention,
            self.uses_local_attention,
            self.uses_encoder_features,
            self.uses_encoder_keys,
        )
        return any(uses) or self.stage == "encoder"

    def options(self) -> dict[str, object]:
        """Return the options that this method was made with, for statistics; `repr` of what JSON cannot hold."""
        plain = (str, int, float, bool, type(None))
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {name: value if isinstance(value, plain) else repr(value) for name, value in public.items()}


class JointMethod(Method):
    """A method that chooses tokens jointly: the worth of a token depends on the other kept ones and on the budget."""

    def score(self, view: PrefillView) -> torch.Tensor:
        raise NotImplementedError(
            f"method {self.name!r} cannot score tokens before it has chosen; use select(view, r).scores"
        )

    @abstractmethod
    def select(self, view: PrefillView, r: float | int) -> Selection:
        """Choose the tokens that stay, and score each by its worth in that choice."""


MethodClass = TypeVar("MethodClass", bound=type[Method])

METHODS: dict[str, type[Method]] = {}
STAGES = ("decoder", "encoder")
MERGINGS = ("paper", "release")


def register(method: MethodClass) -> MethodClass:
    """Make `prune(method=...)` know a class of methods by its `name`; a decorator, also for classes of your own.

    Defining a class of the same module and name again, as a notebook does, replaces the earlier one.

    Raises:
        TypeError: not a class derived from `Method`, or one that lacks an abstract method.
        ValueError: no name, or the name of another method.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        got = method.__name__ if isinstance(method, type) else type(method).__name__
        raise TypeError(f"register: expected a class derived from hawk_kernels.methods.Method, got {got}; derive it")
    if inspect.isabstract(method):
        missing = ", ".join(sorted(method.__abstractmethods__))
        raise TypeError(f"register: expected a class that can be instantiated, got {method.__name__}; define {missing}")
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: expected a string, got {name!r}; {method.__name__} must say what prune calls it")
    known = METHODS.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise ValueError(
            f"name: expected one that no method has yet, got {name!r}, which is that of "
            f"{known.__module__}.{known.__qualname__}; choose another"
        )
    METHODS[name] = method
    return method


def resolve_method(method: str | Method, options: dict[str, object]) -> Method:
    """Return the method object that `method` stands for.

    Args:
        method: a name in `METHODS`, or an instance of a class derived from `Method`.
        options: keyword arguments of the named method; an object brings its own.

    Raises:
        ValueError: unknown name, or an option value the method refuses.
        TypeError: neither a name nor a method, or an option the method does not have.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(
                f"method: expected one of {', '.join(map(repr, sorted(METHODS)))} or an object, got {method!r}"
            )
        known = list(inspect.signature(METHODS[method]).parameters)
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(
                f"method {method!r} has no option {', '.join(map(repr, unknown))}; its options are "
                f"{', '.join(map(repr, known)) or 'none'}"
            )
        return METHODS[method](**options)
    if not isinstance(method, Method):
        if isinstance(method, type):
            raise TypeError(
                f"method: expected a name or a method object, got the class {method.__name__}; pass an instance"
            )
        raise TypeError(
            f"method: expected a name or a method object, got {type(method).__name__}; derive it from "
            "hawk_kernels.methods.Method"
        )
    if method.stage not in STAGES:
        raise ValueError(
            f"stage: expected 'decoder' or 'encoder', got {method.stage!r}; {type(method).__name__} must say where its "
            "merge maps apply"
        )
    if getattr(method, "hidden_from_layer", None) is not None:
        raise TypeError(
            f"hidden_from_layer: expected none in {type(method).__name__}, since it no longer says where tokens "
            "leave; let `stages` return {layer: keep_ratio} instead, and set ranks_by = 'last'"
        )
    if not isinstance(getattr(method, "name", None), str):
        raise ValueError(
            f"name: expected a string, got none; {type(method).__name__} must say what errors and stats call it"
        )
    if options:
        raise TypeError(
            f"options {', '.join(map(repr, sorted(options)))} came beside a method object, which brings its own; "
            f"pass them to {type(method).__name__}(...)"
        )
    return method


def select_in_segments(scores: torch.Tensor, r: float | int, segments: Segments, rounding: str) -> Selection:
    """Select like `select_topk`, with `r` applied to each segment instead of each row.

    Args:
        scores: float32 `[B, M]`.
        r: fraction kept of each segment, or its budget.
        segments: which tokens make up an image.
        rounding: "floor", "ceil" or "nearest" (half to even).
    """
    of_segment = scores.reshape(-1)[segments.index]
    kept = select_topk(of_segment, r, mask=segments.mask, rounding=rounding).mask
    return merged_segments(kept, scores, segments)


def merged_segments(kept: torch.Tensor, scores: torch.Tensor, segments: Segments) -> Selection:
    """Return the selection of the rows from that of their segments.

    Args:
        kept: bool `[S, L]`, the tokens of each segment that stay.
        scores: float32 `[B, M]`.
        segments: which tokens make up an image.
    """
    batch, num_tokens = scores.shape
    # the padding of shorter segments lands in one extra cell after the end
    target = torch.where(segments.mask, segments.index, batch * num_tokens)
    mask = kept.new_zeros(batch * num_tokens + 1).scatter_(0, target.reshape(-1), kept.reshape(-1))
    mask = mask[:-1].view(batch, num_tokens)
    order = torch.arange(num_tokens, device=scores.device).expand(batch, -1)
    slot = torch.where(mask, mask.cumsum(1) - 1, segments.kept_per_row)
    indices = slot.new_full((batch, segments.kept_per_row + 1), -1).scatter_(1, slot, order)
    return Selection(mask, indices[:, :-1], scores)


def checked_scores(method: str, scores: object, candidates: torch.Tensor) -> torch.Tensor:
    """Return what a method gave for the visual tokens, or raise an error that names the method.

    Raises:
        TypeError: not a float32 tensor.
        ValueError: another shape than that of `candidates`, `[B, M]`.
    """
    expected = f"method {method!r}: expected float32 scores of shape {list(candidates.shape)}"
    if not isinstance(scores, torch.Tensor):
        raise TypeError(f"{expected}, got {type(scores).__name__}; return a tensor")
    if scores.shape != candidates.shape:
        raise ValueError(f"{expected}, got shape {list(scores.shape)}; score each visual token of each row")
    if scores.dtype != torch.float32:
        raise TypeError(f"{expected}, got {scores.dtype}; return scores.float()")
    return scores


def checked_selection(method: str, selection: object, candidates: torch.Tensor) -> Selection:
    """Return what a method selected of the visual tokens, or raise an error that names the method.

    Raises:
        TypeError: not a `Selection`, or tensors of other dtypes.
        ValueError: another shape than that of `candidates`, `[B, M]`, or on a CPU a merge map of other tokens.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"method {method!r}: expected a Selection, got {type(selection).__name__}; return one")
    mask = selection.mask
    if mask.dtype != torch.bool or mask.shape != candidates.shape:
        raise ValueError(
            f"method {method!r}: expected a bool mask of shape {list(candidates.shape)}, got {mask.dtype} of shape "
            f"{list(mask.shape)}; mark each visual token that stays"
        )
    checked_scores(method, selection.scores, candidates)
    if selection.merge is not None:
        name = f"method {method!r}: merge"
        check_merge(name, selection.merge, tuple(candidates.shape), mask.device)
        if mask.device.type == "cpu":
            check_entries(name, selection.merge, mask, candidates, ordered=False)
    return selection


def checked_int(value: object, least: int, expected: str, remedy: str) -> int:
    """Return an option of a method as an int.

    Args:
        value: what the caller gave.
        least: the smallest value allowed.
        expected, remedy: how an error message begins and ends.

    Raises:
        TypeError: not an integer (a bool is none).
        ValueError: less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{expected}, got {type(value).__name__}; {remedy}")
    number = int(value)
    if number < least:
        raise ValueError(f"{expected}, got {number}; {remedy}")
    return number


def checked_share(name: str, value: object, remedy: str) -> float:
    """Return an option that is a share of the budget, in [0, 1)."""
    expected = f"{name}: expected a float in [0, 1), a share of the budget"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{expected}, got {type(value).__name__}; {remedy}")
    share = as_written(value)
    if not 0 <= share < 1:
        raise ValueError(f"{expected}, got {share}; {remedy}")
    return share


def checked_merging(merging: str) -> str:
    """Return an option that names what merged tokens become."""
    if merging not in MERGINGS:
        raise ValueError(f"merging: expected 'paper' or 'release', got {merging!r}; the paper's are averages")
    return merging


def attention_of_last_token(view: PrefillView) -> torch.Tensor:
    """Return the attention that the last token of each prompt pays to its visual tokens in the ranking layer.

    Args:
        view: of a stage inside the stack.

    Returns:
        Softmax weights averaged over heads, float32 `[B, M]`, `-inf` where `view.candidates` is False.
    """
    last = view.last_query()
    query, keys = last.query, last.keys
    if keys.dtype == torch.float64:
        query, keys = query.float(), keys.float()
    attention = attention_column_mean(query, keys, reduce_heads=False, scale=last.scale)
    # a position that the token does not see holds the copy of a visible key, so that its softmax cannot underflow
    attention.masked_fill_(~last.visible.unsqueeze(1), 0.0)
    attention /= attention.sum(dim=-1, keepdim=True)
    return attention.mean(dim=1).gather(1, last.visual).masked_fill_(~view.candidates, -torch.inf)


@dataclass(frozen=True)
class Falling:
    """How much stays after a stage on the way to a budget, to which the count falls from all tokens in equal ratios.

    Attributes:
        budget: how many tokens stay in the end.
        part: of the way that the stage has come, in (0, 1).
    """

    budget: int
    part: float

    def count(self, num_candidates: int, rounding: str) -> int:
        """Count the tokens that stay of `num_candidates`."""
        if self.budget >= num_candidates:
            return num_candidates
        return max(self.budget, kept_count((self.budget / num_candidates) ** self.part, num_candidates, rounding))

    def __str__(self) -> str:
        return f"{self.part:.2f} of the way to {self.budget}"


Keep = float | int | Falling
"""How much stays after a stage: a fraction of the original visual tokens, how many, or a number on the way to that."""


def falling_stages(keep_ratio: float | int, depth: int, shares: tuple[float, ...], name: str) -> dict[int, Keep]:
    """Spread stages over the depth of a text model, each of which keeps the same share of what the last one kept.

    Args:
        keep_ratio: the fraction of the original visual tokens that is left after the last stage, or how many.
        depth: layers of the text model.
        shares: of the depth, ascending, after which each stage drops.
        name: of the method, for messages.

    Returns:
        What stays of the original visual tokens by layer; stages that fall on one layer are one.

    Raises:
        ValueError: a model of one layer.
    """
    if depth < 2:
        raise ValueError(f"method: expected one for a text model of {depth} layers, got {name!r}; use 'hawk'")
    stages: dict[int, Keep] = {}
    for number, share in enumerate(shares, start=1):
        part = number / len(shares)
        keep: Keep = keep_ratio**part if isinstance(keep_ratio, float) else Falling(keep_ratio, part)
        stages[min(depth - 1, max(1, int(depth * share)))] = keep_ratio if part == 1 else keep
    return stages


def of_units(tensor: torch.Tensor, view: PrefillView) -> torch.Tensor:
    """Turn `[B, M, ...]` into `[U, L, ...]`, one row for each unit with a budget: a row of the batch, or an image."""
    return tensor if view.segments is None else tensor.flatten(0, 1)[view.segments.index]


def candidates_of_units(view: PrefillView) -> torch.Tensor:
    """Tell which tokens of the units are not padding, bool `[U, L]`."""
    return view.candidates if view.segments is None else view.segments.mask


def of_rows(selection: Selection, view: PrefillView) -> Selection:
    """Return the selection of the rows from that of their units, scores included."""
    if view.segments is None:
        return selection
    shape, mask = view.candidates.shape, view.segments.mask
    target = torch.where(mask, view.segments.index, shape.numel())
    scores = selection.scores.new_full((shape.numel() + 1,), -torch.inf)
    scores = scores.scatter_(0, target.reshape(-1), selection.scores.reshape(-1))[:-1].view(shape)
    found = merged_segments(selection.mask, scores, view.segments)
    return found if selection.merge is None else found.merging(_merge_of_rows(selection.merge, view.segments, shape))


def _merge_of_rows(merge: Merge, segments: Segments, shape: torch.Size) -> Merge:
    """Turn a merge map of segments into one of rows `(B, M)`, which has padding for the entries of other rows."""
    last = segments.index.shape[1] - 1
    target, source = (segments.index.gather(1, places.clamp(0, last)).flatten() for places in merge[:2])
    row = torch.arange(shape[0], device=target.device).unsqueeze(1)
    is_own = (merge.target.flatten() >= 0) & (target // shape[1] == row)
    weight = merge.weight.flatten().expand(shape[0], -1).contiguous()
    return Merge(torch.where(is_own, target % shape[1], -1), torch.where(is_own, source % shape[1], 0), weight)


def selected(kept: torch.Tensor, scores: torch.Tensor, width: int) -> Selection:
    """Return the selection of the kept tokens.

    Args:
        kept: bool `[B, M]`.
        scores: float32 `[B, M]`.
        width: of the indices, at least as many as any row keeps.
    """
    slot = torch.where(kept, kept.cumsum(dim=1) - 1, width)
    places = torch.arange(kept.shape[1], device=kept.device).expand_as(slot)
    indices = slot.new_full((len(kept), width + 1), -1).scatter_(1, slot, places)[:, :width].contiguous()
    return Selection(kept, indices, scores)


def product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Multiply float32 matrices `[..., L, C]` and `[..., C, N]`; autocast, which would round them, is off for it."""
    with without_autocast(one):
        return torch.matmul(one, other)
