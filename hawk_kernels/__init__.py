"""Fast visual-token pruning for vision-language models.

`score_and_select` goes from text queries and visual keys to the kept tokens; `prune` does it for a whole Hugging Face
model. Importing this package needs torch only; Triton and transformers are imported when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hawk_kernels.api import score_and_select, score_tokens, select_topk
from hawk_kernels.attention import attention_column_mean
from hawk_kernels.hiprune import hiprune_select
from hawk_kernels.selection import Selection

if TYPE_CHECKING:
    from hawk_kernels.hf.prune import Pruning, prune

__version__ = "0.1.0"
__all__ = [
    "Pruning",
    "Selection",
    "attention_column_mean",
    "hiprune_select",
    "prune",
    "score_and_select",
    "score_tokens",
    "select_topk",
]

_FROM_TRANSFORMERS = ("Pruning", "prune")


def __getattr__(name: str) -> Any:
    if name not in _FROM_TRANSFORMERS:
        raise AttributeError(f"module 'hawk_kernels' has no attribute {name!r}")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"hawk_kernels.{name} needs transformers, which is not installed: pip install transformers"
        ) from error
    from hawk_kernels.hf import prune as prune_module

    return getattr(prune_module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
