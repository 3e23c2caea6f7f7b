"""What the user asked for by `--video-pruning-rate` and `--hf-overrides`, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hawk_kernels.methods import METHODS, Method, resolve_method

# These look at nothing but one picture or video, so that its rows can be dropped before vLLM caches them.
OF_ONE_PICTURE = (
    *("divprune", "downsample", "evs", "key_norm", "vidcom2"),
    *("fastervlm", "hiprune", "holov", "prumerge", "visionzip", "vispruner"),
)
# whether a method drops tokens inside the stack does not depend on the depth
_SOME_DEPTH = 32


@dataclass(frozen=True)
class Settings:
    """How an engine prunes; every request is pruned in the same way.

    Attributes:
        method: chooses the tokens of each picture or video that stay.
        keep_ratio: the fraction of the tokens of each picture or video that stays.
        head_weights: as in `prune`.
        reads_prompt: whether the choice depends on the prompt around the picture. Such a choice is made when the prompt
            is read, and no cache may share it between prompts.
    """

    method: Method
    keep_ratio: float
    head_weights: Any
    reads_prompt: bool

    def kept_count(self, num_tokens: int) -> int:
        """Count the tokens that stay of a picture or video of `num_tokens`."""
        return self.method.kept_count(self.keep_ratio, num_tokens)

    def check_pixels(self, modality: str, given: Collection[str]) -> None:
        """Refuse a picture or video that comes as embeddings to a method that watches how the encoder makes these.

        Args:
            modality: "image" or "video".
            given: names of what came of it.

        Raises:
            ValueError: embeddings came.
        """
        if f"{modality}_embeds" in given and self.method.reads_encoder():
            raise ValueError(
                f"{modality}_embeds: expected pixels with method {self.method.name!r}, which reads the vision encoder, "
                f"got embeddings; send the {modality} itself, or serve with another method, such as 'divprune'"
            )


def read_settings(config: Any, pruning_rate: float | None) -> Settings:
    """Read the settings of an engine.

    Args:
        config: the model's config, whose attribute `hawk` is what `--hf-overrides` put there, or missing.
        pruning_rate: `--video-pruning-rate`, the fraction of the visual tokens that is dropped.

    Raises:
        ValueError: no pruning rate, or an unknown method or option value.
        TypeError: `hawk` is no object, an unknown option, or a method that cannot work inside vLLM.
    """
    if not pruning_rate:
        raise ValueError(
            f"video_pruning_rate: expected a number in (0, 1), got {pruning_rate}; pass --video-pruning-rate 0.8 to "
            "keep a fifth of the visual tokens of each image and video. No other option turns vLLM's pruning on"
        )
    given = getattr(config, "hawk", None)
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"hawk: expected an object in --hf-overrides, got {given!r}; write "
            '{"architectures": [...], "hawk": {"method": "hawk"}}'
        )
    options = dict(given)
    for name, remedy in (
        ("keep_ratio", "leave it out and pass --video-pruning-rate, which is 1 - keep_ratio"),
        ("budget", "leave it out: in vLLM each image and video has a budget of its own"),
        ("query", "leave it out: in vLLM the text after the last image ranks the visual tokens"),
    ):
        if name in options:
            raise TypeError(f"hawk: expected a method and its options, got {name!r}; {remedy}")
    name = options.pop("method", "hawk")
    head_weights = options.pop("head_weights", None)
    method = resolve_method(name, options)
    _check_works_in_vllm(method)
    if head_weights is not None and not method.uses_head_weights:
        raise TypeError(f"head_weights: method {method.name!r} uses none; leave them out of hawk")
    return Settings(method, 1 - pruning_rate, head_weights, method.name not in OF_ONE_PICTURE)


def _check_works_in_vllm(method: Method) -> None:
    lacks = _what_vllm_lacks(method)
    if lacks:
        # a class of the user's own may need arguments
        own = {name: other() for name, other in METHODS.items() if other.__module__.startswith("hawk_kernels.methods.")}
        *working, last = (repr(name) for name, other in sorted(own.items()) if _what_vllm_lacks(other) is None)
        raise TypeError(
            f"method: expected one that works inside vLLM, got {method.name!r}, but {lacks}; "
            f"use {', '.join(working)} or {last}"
        )


def _what_vllm_lacks(method: Method) -> str | None:
    """Say why a method cannot work inside vLLM, or return None if it can."""
    if method.inside_only or any(method.stages(0.5, _SOME_DEPTH)):
        return "vLLM prunes before the first layer and drops no tokens after later ones"
    if method.uses_positions:
        return "vLLM projects queries and keys before it knows their positions"
    if method.uses_local_attention:
        return "no shallow layer of the vision encoder is watched there"
    return None
