"""The Triton backend: one file per kernel. Imported only when it is used."""

from hawk_kernels.backends.triton.column_stats import attention_column_mean
from hawk_kernels.backends.triton.score_select import score_and_select, score_tokens
from hawk_kernels.backends.triton.select_rows import select_topk

__all__ = ["attention_column_mean", "score_and_select", "score_tokens", "select_topk"]
