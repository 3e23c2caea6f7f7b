"""Reads a prompt from a call to the host: where its visual tokens and its text queries stand."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.question import GIVEN, NAMED_QUERIES, Query, text_queries


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts as host arrays, so that every later length is known without asking the device.

    Attributes:
        ids: int64 `[B, T]`.
        valid: bool `[B, T]`, False at padding and at tokens that the caller hides.
        visual: bool `[B, T]`, True at the visual tokens, which may be dropped.
        query: bool `[B, T]`, True at the text tokens that rank the visual ones.
        query_sources: for each row a description of where its queries were found.
        length: tokens of a row that are the prompt's own; assisted decoding appends guesses after them.
        placeholders: bool `[B, T]`, True wherever a feature of an image or video stands: at `visual`, at tokens that
            the caller hides, and at tokens that only separate the visual tokens of an image. None means at `visual`
            alone.
        starts: bool `[B, T]`, True at the first placeholder of each image or video. None means that each run of one
            placeholder id is an image or a video.
        tiles: int64 `[B, T]`, which tile of its row a placeholder belongs to, counted from 0, -1 elsewhere. None means
            that nobody asked for tiles.
        separators: bool `[B, T]`, the placeholders that only separate visual tokens, such as image newlines. None means
            that they are not known.
    """

    ids: np.ndarray
    valid: np.ndarray
    visual: np.ndarray
    query: np.ndarray
    query_sources: list[str]
    length: int
    placeholders: np.ndarray | None = None
    starts: np.ndarray | None = None
    tiles: np.ndarray | None = None
    separators: np.ndarray | None = None

    def all_placeholders(self) -> np.ndarray:
        """Mark where features of images and videos stand, bool `[B, T]`."""
        return self.visual if self.placeholders is None else self.placeholders

    def with_separators(self, separators: np.ndarray) -> Prompt:
        """Return the same prompt, some of whose placeholders, bool `[B, T]`, only separate visual tokens."""
        return replace(self, visual=self.visual & ~separators, placeholders=self.all_placeholders())

    def with_images(self, lengths: dict[str, list[int]], kinds: dict[int, str]) -> Prompt:
        """Return the same prompt, divided into the encoder's images and videos, whatever stands between their tokens.

        Args:
            lengths: visual tokens of each image and of each video, by kind, in their order. Where `generate` repeats a
                sample, these may be given once for all its rows.
            kinds: kind of each placeholder id.

        Returns:
            A prompt with `starts`, or this one where the lengths do not fit its placeholders.
        """
        placeholders = self.all_placeholders()
        copies = self.copies_of_rows(sum(map(sum, lengths.values())))
        waiting = {kind: deque(of_kind) for kind, of_kind in lengths.items()}
        starts = np.zeros_like(placeholders)
        for row in range(0, len(self.ids), copies):
            positions = np.flatnonzero(placeholders[row])
            while positions.size:
                first = self.ids[row, positions[0]]
                # some models mark the frames of a video as images
                queue = waiting.get(kinds[int(first)]) or next((other for other in waiting.values() if other), None)
                length = queue.popleft() if queue else 0
                if not 0 < length <= positions.size or (self.ids[row, positions[:length]] != first).any():
                    return self
                starts[row : row + copies, positions[0]] = True
                positions = positions[length:]
        return self if any(waiting.values()) else replace(self, starts=starts)

    def copies_of_rows(self, encoded: int) -> int:
        """Count the equal rows in succession that stand for one sample, where the encoder returned `encoded` tokens."""
        copies = int(self.all_placeholders().sum()) // max(1, encoded)
        if copies < 2 or len(self.ids) % copies:
            return 1
        of_samples = self.ids.reshape(-1, copies, self.ids.shape[1])
        return copies if (of_samples == of_samples[:, :1]).all() else 1

    def ends_in_text(self, columns: int) -> bool:
        """Tell whether the last `columns` tokens of every row are text, so that they also end a packed row."""
        last = slice(-columns, None)
        return bool((self.valid[:, last] & ~self.visual[:, last]).all())

    def whole_images(self, row: int) -> list[np.ndarray]:
        """Find the positions of the placeholders of each image or video of a row."""
        positions = np.flatnonzero(self.all_placeholders()[row])
        if positions.size == 0:
            return []
        if self.starts is None:
            begins = (np.diff(positions) != 1) | (np.diff(self.ids[row, positions]) != 0)
        else:
            begins = self.starts[row, positions[1:]]
        return np.split(positions, np.flatnonzero(begins) + 1)

    def images(self, row: int) -> list[np.ndarray]:
        """Find the positions of the visual tokens of each image or video of a row; an image may have none left."""
        return [image[self.visual[row, image]] for image in self.whole_images(row)]

    def units(self, row: int) -> list[np.ndarray]:
        """Find the positions of the visual tokens of each image of a row, or of each tile where tiles are known."""
        if self.tiles is None:
            return self.images(row)
        tiles = self.tiles[row]
        return [np.flatnonzero(self.visual[row] & (tiles == tile)) for tile in range(int(tiles.max()) + 1)]

    def unit_lengths(self) -> list[list[int]]:
        """Count the visual tokens of each image, or of each tile where tiles are known, of each row."""
        return [[len(unit) for unit in self.units(row)] for row in range(len(self.ids))]

    def candidates(self) -> Prompt:
        """Return the same prompt, in which known separators do not count as visual tokens."""
        return self if self.separators is None else self.with_separators(self.separators)


def padded_positions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List the positions of the True entries of each row, ascending, in rows of one length.

    Args:
        mask: bool `[B, T]`.

    Returns:
        The positions, int64 `[B, M]`, 0 where a shorter row is padded at its end; and bool `[B, M]`, False there.
    """
    counts = mask.sum(axis=1)
    filled = np.arange(int(counts.max(initial=0))) < counts[:, None]
    positions = np.zeros(filled.shape, dtype=np.int64)
    positions[filled] = np.nonzero(mask)[1]
    return positions, filled


def read_prompt(
    anatomy: Anatomy, arguments: dict[str, Any], query: Query | None, guesses: int = 0
) -> tuple[Prompt | None, torch.Tensor | None]:
    """Read the prompt of a call of the multimodal model, with one transfer from the device.

    Args:
        anatomy: the model's parts.
        arguments: of the call: `input_ids` `[B, T]`; `attention_mask`, None, `[B, T]`, or what `generate` prepares for
            a cache of fixed size; `past_key_values`; `position_ids`.
        query: the caller's choice of text queries, or None.
        guesses: tokens at the end that assisted decoding proposes; they are not part of the prompt.

    Returns:
        The prompt, or None where the cache is not empty; and the tokens that are not padding, bool `[B, T]` on the
        device, or None where no token is padding.

    Raises:
        ValueError: a mask that does not fit the prompt, or over pairs of tokens; text queries of another shape;
            several samples with images in one row.
        TypeError: text queries that are not a bool tensor.
    """
    input_ids, cache = arguments["input_ids"], arguments.get("past_key_values")
    cached = 0 if cache is None else cache.get_seq_length()
    if not isinstance(cached, torch.Tensor) and cached > 0:
        return None, None
    valid = _valid_tokens(arguments.get("attention_mask"), input_ids, cache)
    prompt_length = input_ids.shape[1] - guesses
    find = NAMED_QUERIES[query] if isinstance(query, str) else text_queries
    queries = None if query is None or isinstance(query, str) else _given_queries(query, input_ids[:, :prompt_length])
    length = cached if isinstance(cached, torch.Tensor) else None
    restarts = _restarts(arguments.get("position_ids"), valid, anatomy.family.position_axes)
    host_ids, host_valid, host_queries, host_length, host_restarts = _fetch(input_ids, valid, queries, length, restarts)
    if host_length is not None and host_length.item() > 0:
        return None, None
    host_valid = np.ones(host_ids.shape, dtype=bool) if host_valid is None else host_valid.astype(bool)
    own_ids, own = host_ids[:, :prompt_length], host_valid[:, :prompt_length]
    placeholders = np.isin(own_ids, anatomy.visual_token_ids)
    visual = placeholders & own
    if visual.any():
        _check_one_sample_a_row(arguments, host_restarts)
    if host_queries is None:
        found, sources = find(own_ids, own, visual, anatomy.markers)
    else:
        found, sources = host_queries.astype(bool) & own, [GIVEN] * len(host_ids)
    visual, found, placeholders = (np.pad(mask, ((0, 0), (0, guesses))) for mask in (visual, found, placeholders))
    return Prompt(host_ids, host_valid, visual, found, sources, prompt_length, placeholders), valid


def given_ids(arguments: dict[str, Any]) -> torch.Tensor | None:
    """Return the ids of the prompt that `generate` is called with, `[B, T]`; None where it gets none."""
    given = (arguments.get(name) for name in ("inputs", "input_ids"))
    return next((ids for ids in given if isinstance(ids, torch.Tensor) and ids.dim() == 2), None)


def count_guesses(given: torch.Tensor | None, input_ids: torch.Tensor) -> int:
    """Count the tokens that assisted decoding reads together with the prompt, after it.

    Args:
        given: what `generate` was called with, `[B, T]`.
        input_ids: what the model reads, `[B, T']`.
    """
    if given is None or input_ids.shape[0] != given.shape[0] or input_ids.shape[1] <= given.shape[1]:
        return 0
    length = given.shape[1]
    return int(input_ids.shape[1]) - length if torch.equal(input_ids[:, :length], given.to(input_ids)) else 0


def check_one_prefill(model: Any, arguments: dict[str, Any], length: int | None) -> None:
    """Refuse a call of `generate` that would read a prompt of `length` tokens in chunks.

    Raises:
        ValueError: `prefill_chunk_size` is shorter than the prompt.
    """
    config = arguments.get("generation_config") or getattr(model, "generation_config", None)
    chunk = arguments.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if chunk is not None and length is not None and chunk < length:
        raise ValueError(
            f"prefill_chunk_size: expected the prompt in one call, got chunks of {chunk} of {length} tokens; the "
            f"budget and the question are those of the whole prompt, so pass prefill_chunk_size={length} or None. "
            "If memory does not allow that, let generate read the conversation turn by turn over one past_key_values"
        )


def _valid_tokens(
    attention_mask: torch.Tensor | dict[str, Any] | None, input_ids: torch.Tensor, cache: Any
) -> torch.Tensor | None:
    if isinstance(attention_mask, dict):
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        if not getattr(cache, "is_compileable", False):
            raise ValueError(
                f"attention_mask: expected a [batch, length] mask, got shape {list(attention_mask.shape)}; prune "
                "cannot tell from a mask over pairs which tokens are padding, so pass the 2-D mask of the tokenizer, "
                "from which the model makes the causal mask over pairs itself. Only outside the block can attention "
                "be other than causal"
            )
        diagonal = attention_mask.diagonal(dim1=-2, dim2=-1)[:, 0]
        valid = diagonal if diagonal.dtype == torch.bool else diagonal == 0
        return valid.expand(input_ids.shape[0], -1)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected the shape of input_ids, {list(input_ids.shape)}, got "
            f"{list(attention_mask.shape)}; pass the whole prompt in one call with an empty cache"
        )
    return attention_mask.to(input_ids.device) != 0


def _restarts(position_ids: torch.Tensor | None, valid: torch.Tensor | None, axes: int) -> torch.Tensor | None:
    """Tell which rows hold tokens whose positions do not go up, bool `[B]`; None where no position ids count text."""
    if position_ids is not None and position_ids.dim() == 3 and position_ids.shape[0] == axes + 1:
        position_ids = position_ids[0]
    if position_ids is None or position_ids.dim() != 2:
        return None
    back = position_ids.diff(dim=-1) <= 0
    if valid is not None:
        valid = valid.to(back.device)
        back = back & valid[:, 1:] & valid[:, :-1]
    return back.any(dim=-1)


def _check_one_sample_a_row(arguments: dict[str, Any], restarts: np.ndarray | None) -> None:
    remedy = "pass one sample a row, padded, with an attention_mask"
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        if arguments.get(name) is not None:
            raise ValueError(
                f"{name}: expected one sample in each row, got the bounds of samples that share a row; prune has one "
                f"question and one budget for a row, so {remedy}"
            )
    if restarts is not None and restarts.any():
        raise ValueError(
            f"position_ids: expected one sample in each row, got positions that start again in row "
            f"{int(np.flatnonzero(restarts)[0])}, as in packed batches without padding; prune has one question and one "
            f"budget for a row, so {remedy}"
        )


def _given_queries(
    query: torch.Tensor | Callable[[torch.Tensor], torch.Tensor], input_ids: torch.Tensor
) -> torch.Tensor:
    mask = query(input_ids) if callable(query) else query
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        came = f"a tensor of {mask.dtype}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(
            f"query: expected a bool tensor like input_ids, or a callable that returns one, got {came}; use mask.bool()"
        )
    batch, length = input_ids.shape
    # generate repeats a sample for its beams and return sequences
    if mask.dim() == 2 and mask.shape[1] == length and mask.shape[0] and batch % mask.shape[0] == 0:
        return mask.repeat_interleave(batch // mask.shape[0], dim=0)
    raise ValueError(
        f"query: expected shape [{batch}, {length}] like input_ids, got {list(mask.shape)}; mark each text token that "
        "ranks the visual tokens with True"
    )


def _fetch(*tensors: torch.Tensor | None) -> list[Any]:
    """Copy the tensors to host arrays in one transfer; None stays None."""
    given = [tensor for tensor in tensors if tensor is not None]
    device = next((tensor.device for tensor in given if tensor.device.type != "cpu"), torch.device("cpu"))
    flat = torch.cat([tensor.reshape(-1).to(device, torch.int64) for tensor in given]).cpu().numpy()
    sizes = np.cumsum([tensor.numel() for tensor in given])[:-1]
    parts = iter(np.split(flat, sizes))
    return [None if tensor is None else next(parts).reshape(tensor.shape) for tensor in tensors]
