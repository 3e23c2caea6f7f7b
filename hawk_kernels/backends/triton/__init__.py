"""The Triton backend: one file per kernel. Imported only when it is used."""

from hawk_kernels.backends.triton.column_stats import attention_column_mean
from hawk_kernels.backends.triton.compaction import compact
from hawk_kernels.backends.triton.greedy import greedy_dpp, greedy_max_min
from hawk_kernels.backends.triton.hidden import score_hidden, score_hidden_and_select
from hawk_kernels.backends.triton.score_select import score_and_select, score_tokens
from hawk_kernels.backends.triton.select_rows import select_topk

__all__ = [
    "attention_column_mean",
    "compact",
    "greedy_dpp",
    "greedy_max_min",
    "score_and_select",
    "score_hidden",
    "score_hidden_and_select",
    "score_tokens",
    "select_topk",
]
