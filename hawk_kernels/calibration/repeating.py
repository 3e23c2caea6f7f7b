"""Lets many rows read one prompt at once: the vision encoder sees it once, the text model once for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hawk_kernels.hf.anatomy import Anatomy
from hawk_kernels.hf.families import VISUAL_FEATURES
from hawk_kernels.hf.hooks import named


class RepeatedPrompt:
    """A `with` block in which a prompt of one row enters the text model as `rows` equal ones.

    Everything in front of the text model, the vision encoder above all, runs once; logits and cache have `rows` rows,
    and later calls with as many rows pass as they are. By forward hooks alone.

    Attributes:
        following: position ids of the token after the prompt, `[..., rows, 1]`; None where the text model counts.
    """

    def __init__(self, anatomy: Anatomy, rows: int) -> None:
        self._text = anatomy.text
        self._rows = rows
        self._handle: Any = None
        self.following: torch.Tensor | None = None

    def __enter__(self) -> RepeatedPrompt:
        # in front of all others, which then see as many rows as attention will
        self._handle = self._text.register_forward_pre_hook(self._before_text, with_kwargs=True, prepend=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()

    def _before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        kwargs = named(module, args, kwargs)
        cache = kwargs.get("past_key_values")
        # what follows the prompt has its rows already
        if cache is not None and int(cache.get_seq_length()) > 0:
            return None
        repeated = {name: self._repeated(name, value) for name, value in kwargs.items()}
        positions = repeated.get("position_ids")
        self.following = None if positions is None else positions[..., -1:] + 1
        return (), repeated

    def _repeated(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._repeated(name, item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._repeated(name, item) for item in value)
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        if name in VISUAL_FEATURES:
            return value.repeat(self._rows, *[1] * (value.dim() - 1))
        if name == "position_ids":
            return value.expand(*value.shape[:-2], self._rows, -1)
        return value.expand(self._rows, *value.shape[1:]) if value.shape[0] == 1 and value.dim() > 1 else value
