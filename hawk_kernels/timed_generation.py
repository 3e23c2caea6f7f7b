"""Times one `generate`: until the first token, and for each token after it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TimedGeneration:
    """What one `generate` returned and took.

    Attributes:
        sequences: as `generate` returns them, int64 `[B, T]`.
        cache: the cache at the end; it holds the prompt and all new tokens but the last.
        new_tokens: how many were generated.
        first_token: seconds until the first token, the vision encoder included.
        next_token: seconds for each token after it; None where there is none.
    """

    sequences: torch.Tensor
    cache: Any
    new_tokens: int
    first_token: float
    next_token: float | None

    @property
    def cache_bytes(self) -> int:
        """Count the bytes of the keys and values of all layers; layers of another kind of state do not count."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._keys_and_values())

    @property
    def prompt_bytes(self) -> int:
        """Count the bytes of the keys and values of the prompt alone."""
        later = self.new_tokens - 1
        return sum(
            tensor[..., : max(0, tensor.shape[-2] - later), :].numel() * tensor.element_size()
            for tensor in self._keys_and_values()
        )

    def _keys_and_values(self) -> list[torch.Tensor]:
        layers = getattr(self.cache, "layers", ())
        parts = (getattr(layer, part, None) for layer in layers for part in ("keys", "values"))
        return [tensor for tensor in parts if tensor is not None]


def timed_generation(model: Any, inputs: Mapping[str, Any], **options: Any) -> TimedGeneration:
    """Generate greedily from `inputs`, and note when each token is chosen.

    Args:
        model: in eval mode.
        inputs: of the model, on its device.
        **options: further arguments of `generate`, such as `max_new_tokens`.
    """
    import torch

    device = inputs["input_ids"].device
    stamps: list[float] = []

    def stamp(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Note when a token was chosen; as a stopping criterion, never stop."""
        _finish(device)
        stamps.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    _finish(device)
    started = time.perf_counter()
    out = model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        stopping_criteria=[stamp],
        **options,
    )
    later = len(stamps) - 1
    return TimedGeneration(
        sequences=out.sequences,
        cache=out.past_key_values,
        new_tokens=len(stamps),
        first_token=stamps[0] - started,
        next_token=(stamps[-1] - stamps[0]) / later if later else None,
    )


def _finish(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
