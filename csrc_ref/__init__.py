"""Literal references of the kernels: plain PyTorch, slow, float64-capable, one file per op.

Same names and signatures as the package, each line traceable to an equation. Nothing here is imported by the package
and nothing of the package is imported here, so that a mistake in one cannot hide in the other.
"""

from csrc_ref.attention_column_mean import attention_column_mean
from csrc_ref.hiprune_select import hiprune_select
from csrc_ref.score_and_select import score_and_select
from csrc_ref.score_tokens import score_tokens
from csrc_ref.select_topk import Selection, select_topk

__all__ = ["Selection", "attention_column_mean", "hiprune_select", "score_and_select", "score_tokens", "select_topk"]
