"""The PyTorch backend: runs anywhere, the default on CPU."""

from hawk_kernels.backends.torch_column_stats import attention_column_mean
from hawk_kernels.backends.torch_compaction import compact
from hawk_kernels.backends.torch_greedy import greedy_dpp, greedy_max_min
from hawk_kernels.backends.torch_hidden import score_hidden, score_hidden_and_select
from hawk_kernels.backends.torch_scores import score_and_select, score_tokens, select_topk

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
