"""What the vision encoder was told and returned, as far as an overlay needs it: small references, nothing computed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hawk_kernels.hf.watched_method import WatchedMethod

_ATTRIBUTE = "_hawk_kernels_encoded"
_KINDS = ("image", "video")


@dataclass(frozen=True)
class Encoded:
    """The images, or the videos, of one call of the multimodal model.

    Attributes:
        arguments: what the encoder was told. Integer tensors, numbers and lists are held as they are; of every other
            tensor, the pixels above all, only the shape is held.
        lengths: visual tokens of each entry that the encoder returned; empty where it returned no entries.
    """

    arguments: dict[str, Any]
    lengths: tuple[int, ...]


class EncodingWatch:
    """Notes what is encoded while it is attached. It reads no values, so that no device is waited for.

    Args:
        multimodal: the model that has `get_image_features` or `get_video_features`.
    """

    def __init__(self, multimodal: Any) -> None:
        self._multimodal = multimodal
        self._thread = _ThreadState()

    def attach(self) -> list[Any]:
        """Watch the encoding; returns what ends that."""
        return [
            WatchedMethod(self._multimodal, f"get_{kind}_features", partial(self._watch, kind))
            for kind in _KINDS
            if hasattr(self._multimodal, f"get_{kind}_features")
        ]

    def start(self) -> None:
        """Forget what earlier calls of the multimodal model encoded."""
        self._thread.seen = {}

    def encoded(self, arguments: dict[str, Any]) -> dict[str, Encoded]:
        """What was encoded for a call of the multimodal model, by kind, "image" and "video".

        Args:
            arguments: those of the call; `generate` encodes beforehand and hands over the features in them.
        """
        features = arguments.get("mm_encoder_outputs") or {}
        given = {kind: getattr(features.get(kind), _ATTRIBUTE, None) for kind in _KINDS}
        told = small(arguments)
        found = {**self._thread.seen, **{kind: run for kind, run in given.items() if run is not None}}
        return {kind: Encoded({**told, **run.arguments}, run.lengths) for kind, run in found.items()}

    @contextmanager
    def _watch(self, kind: str, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        """Around a call of `get_image_features` or `get_video_features`; one may call the other."""
        thread = self._thread
        is_inner, thread.is_encoding = thread.is_encoding, True

        def keep(features: Any) -> None:
            if is_inner:
                return
            run = Encoded(small(arguments), _lengths(features))
            thread.seen[kind] = run
            # a plain tuple or tensor cannot carry an attribute of ours, and no model accepts one back
            if not isinstance(features, tuple | list | torch.Tensor):
                setattr(features, _ATTRIBUTE, run)

        try:
            yield keep
        finally:
            thread.is_encoding = is_inner


def small(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that describe images: integer tensors, numbers and lists; shapes of all other tensors."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            is_count = not value.is_floating_point() and value.dtype != torch.bool
            found[name] = value if is_count and name not in _TEXT else value.shape
        elif isinstance(value, int | float | list | tuple) and not _holds_tensors(value):
            found[name] = value
    return found


# one entry a token: of no use here, and long
_TEXT = ("input_ids", "attention_mask", "position_ids", "labels", "token_type_ids", "mm_token_type_ids")


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and any(isinstance(entry, torch.Tensor) for entry in value)


def _lengths(features: Any) -> tuple[int, ...]:
    pooled = getattr(features, "pooler_output", features)
    if isinstance(pooled, torch.Tensor) and pooled.dim() < 3:
        return ()
    if not isinstance(pooled, torch.Tensor | list | tuple) or not all(isinstance(x, torch.Tensor) for x in pooled):
        return ()
    return tuple(entry.shape[:-1].numel() for entry in pooled)


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.is_encoding = False
        self.seen: dict[str, Encoded] = {}
