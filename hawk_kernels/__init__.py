"""Fast visual-token pruning for vision-language models.

`score_and_select` goes from text queries and visual keys to the kept tokens; `prune` does it for a whole Hugging Face
model. Importing this package imports nothing else: torch, Triton and transformers are imported with the first name that
needs them, so that `hawk-kernels info` can report a torch that does not import. The operators are registered with
`torch.library` at that moment too; a program that only loads exported graphs imports `hawk_kernels.ops` first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hawk_kernels.calibration.run import calibrate
    from hawk_kernels.checkpoint import load_processor
    from hawk_kernels.compile_ahead import warm_up_score_and_select
    from hawk_kernels.hf.prune import Pruning, prune
    from hawk_kernels.hf.warm_up import warm_up
    from hawk_kernels.layer import Layer
    from hawk_kernels.ops.attention_column_mean import attention_column_mean
    from hawk_kernels.ops.compact import Compacted, compact
    from hawk_kernels.ops.greedy import greedy_dpp, greedy_max_min
    from hawk_kernels.ops.hiprune_select import hiprune_select
    from hawk_kernels.ops.score_and_select import score_and_select, score_tokens
    from hawk_kernels.ops.score_hidden import score_hidden, score_hidden_and_select
    from hawk_kernels.ops.score_peaks import score_peaks
    from hawk_kernels.ops.select_topk import select_topk
    from hawk_kernels.selection import Selection
    from hawk_kernels.workspaces import free_workspaces

__version__ = "0.1.0"
__all__ = [
    "Compacted",
    "Layer",
    "Pruning",
    "Selection",
    "attention_column_mean",
    "calibrate",
    "compact",
    "free_workspaces",
    "greedy_dpp",
    "greedy_max_min",
    "hiprune_select",
    "load_processor",
    "prune",
    "score_and_select",
    "score_hidden",
    "score_hidden_and_select",
    "score_peaks",
    "score_tokens",
    "select_topk",
    "warm_up",
    "warm_up_score_and_select",
]

_FROM_TORCH = {
    "Compacted": "hawk_kernels.ops.compact",
    "Layer": "hawk_kernels.layer",
    "Selection": "hawk_kernels.selection",
    "attention_column_mean": "hawk_kernels.ops.attention_column_mean",
    "compact": "hawk_kernels.ops.compact",
    "free_workspaces": "hawk_kernels.workspaces",
    "greedy_dpp": "hawk_kernels.ops.greedy",
    "greedy_max_min": "hawk_kernels.ops.greedy",
    "hiprune_select": "hawk_kernels.ops.hiprune_select",
    "score_and_select": "hawk_kernels.ops.score_and_select",
    "score_hidden": "hawk_kernels.ops.score_hidden",
    "score_hidden_and_select": "hawk_kernels.ops.score_hidden",
    "score_peaks": "hawk_kernels.ops.score_peaks",
    "score_tokens": "hawk_kernels.ops.score_and_select",
    "select_topk": "hawk_kernels.ops.select_topk",
    "warm_up_score_and_select": "hawk_kernels.compile_ahead",
}
_FROM_TRANSFORMERS = {
    "Pruning": "hawk_kernels.hf.prune",
    "calibrate": "hawk_kernels.calibration.run",
    "load_processor": "hawk_kernels.checkpoint",
    "prune": "hawk_kernels.hf.prune",
    "warm_up": "hawk_kernels.hf.warm_up",
}


def __getattr__(name: str) -> Any:
    if name in _FROM_TORCH:
        module = _FROM_TORCH[name]
    elif name in _FROM_TRANSFORMERS:
        module = _FROM_TRANSFORMERS[name]
        try:
            import_module("transformers")
        except ImportError as error:
            raise ImportError(
                f"hawk_kernels.{name} needs transformers, which is not installed: pip install transformers"
            ) from error
    else:
        raise AttributeError(f"module 'hawk_kernels' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    # torch.compile reads a module's dict, not its __getattr__
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
