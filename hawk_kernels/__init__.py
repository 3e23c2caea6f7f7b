"""Fast visual-token pruning for vision-language models.

`score_and_select` goes from text queries and visual keys to the kept tokens; `prune` does it for a whole Hugging Face
model. Importing this package needs torch only; Triton and transformers are imported when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hawk_kernels.layer import Layer
from hawk_kernels.ops.attention_column_mean import attention_column_mean
from hawk_kernels.ops.compact import Compacted, compact
from hawk_kernels.ops.greedy import greedy_dpp, greedy_max_min
from hawk_kernels.ops.hiprune_select import hiprune_select
from hawk_kernels.ops.score_and_select import score_and_select, score_tokens
from hawk_kernels.ops.score_hidden import score_hidden, score_hidden_and_select
from hawk_kernels.ops.select_topk import select_topk
from hawk_kernels.selection import Selection

if TYPE_CHECKING:
    from hawk_kernels.calibration.run import calibrate
    from hawk_kernels.hf.prune import Pruning, prune

__version__ = "0.1.0"
__all__ = [
    "Compacted",
    "Layer",
    "Pruning",
    "Selection",
    "attention_column_mean",
    "calibrate",
    "compact",
    "greedy_dpp",
    "greedy_max_min",
    "hiprune_select",
    "prune",
    "score_and_select",
    "score_hidden",
    "score_hidden_and_select",
    "score_tokens",
    "select_topk",
]

_FROM_TRANSFORMERS = {
    "Pruning": "hawk_kernels.hf.prune",
    "calibrate": "hawk_kernels.calibration.run",
    "prune": "hawk_kernels.hf.prune",
}


def __getattr__(name: str) -> Any:
    if name not in _FROM_TRANSFORMERS:
        raise AttributeError(f"module 'hawk_kernels' has no attribute {name!r}")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"hawk_kernels.{name} needs transformers, which is not installed: pip install transformers"
        ) from error
    return getattr(import_module(_FROM_TRANSFORMERS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
