"""Literal references: plain PyTorch, slow, float64-capable, one file for each operator and for each method.

Names and signatures are those of the package, and each line can be traced to an equation. The package imports nothing
from here, and nothing here imports the package, so that a mistake in one cannot hide in the other. The references of
operators are exported below; the test of a method imports the reference of that method from its file.
"""

from csrc_ref.attention_column_mean import attention_column_mean
from csrc_ref.compact import Compacted, compact
from csrc_ref.greedy import greedy_dpp, greedy_max_min
from csrc_ref.head_importance import head_importance
from csrc_ref.hiprune_select import hiprune_select
from csrc_ref.score_and_select import score_and_select, score_tokens
from csrc_ref.score_hidden import score_hidden, score_hidden_and_select
from csrc_ref.score_peaks import score_peaks
from csrc_ref.select_topk import Selection, select_topk

__all__ = [
    "Compacted",
    "Selection",
    "attention_column_mean",
    "compact",
    "greedy_dpp",
    "greedy_max_min",
    "head_importance",
    "hiprune_select",
    "score_and_select",
    "score_hidden",
    "score_hidden_and_select",
    "score_peaks",
    "score_tokens",
    "select_topk",
]
