"""How many visual tokens each image becomes, as the vision encoder returns them.

Processors set images side by side, or break one into rows and frames: placeholders alone do not show where one ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from hawk_kernels.hf.families import Anatomy
from hawk_kernels.hf.watched_method import WatchedMethod


class ImageWatch:
    """Notes the lengths of what is encoded while it is attached, for families whose encoder returns whole images.

    Args:
        anatomy: the model's parts.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self._multimodal: Any = anatomy.multimodal
        self._kinds = anatomy.family.encoded_whole
        self._thread = _ThreadState()

    def attach(self) -> list[Any]:
        """Watch the encoding; returns what ends that."""
        names = ((kind, f"get_{kind}_features") for kind in ("image", "video"))
        return [
            WatchedMethod(self._multimodal, name, partial(self._watch, kind))
            for kind, name in names
            if hasattr(self._multimodal, name)
        ]

    def start(self) -> None:
        """Forget what earlier calls of the multimodal model encoded."""
        self._thread.lengths = {}

    def lengths(self, arguments: dict[str, Any]) -> dict[str, list[int]]:
        """Visual tokens of each image and of each video of a call of the multimodal model, by kind.

        Args:
            arguments: those of the call.
        """
        encoded = arguments.get("mm_encoder_outputs") or {}
        given = {kind: _lengths(encoded[kind]) for kind in self._kinds if encoded.get(kind) is not None}
        return {**self._thread.lengths, **given}

    @contextmanager
    def _watch(self, kind: str, arguments: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        """Around a call of `get_image_features` or `get_video_features`; one may call the other."""
        thread = self._thread
        is_inner, thread.is_encoding = thread.is_encoding, True

        def keep(features: Any) -> None:
            if not is_inner and kind in self._kinds:
                thread.lengths[kind] = _lengths(features)

        try:
            yield keep
        finally:
            thread.is_encoding = is_inner


def _lengths(features: Any) -> list[int]:
    """Visual tokens of each entry of what an encoder returned; none where it does not tell."""
    pooled = getattr(features, "pooler_output", features)
    if isinstance(pooled, torch.Tensor) and pooled.dim() < 3:
        return []
    if not isinstance(pooled, torch.Tensor | list | tuple):
        return []
    return [entry.shape[:-1].numel() for entry in pooled]


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.is_encoding = False
        self.lengths: dict[str, list[int]] = {}
