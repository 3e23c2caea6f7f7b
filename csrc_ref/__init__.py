"""Literal references of the kernels: plain PyTorch, slow, float64-capable, one file per op.

Same names and signatures as the package, each line traceable to an equation. Nothing here is imported by the package
and nothing of the package is imported here, so that a mistake in one cannot hide in the other.
"""

from csrc_ref.attention_column_mean import attention_column_mean
from csrc_ref.cdpruner_quality import cdpruner_quality
from csrc_ref.compact import Compacted, compact
from csrc_ref.dart_select import dart_select
from csrc_ref.evenly_spread import evenly_spread
from csrc_ref.fastv_scores import fastv_scores
from csrc_ref.greedy import greedy_dpp, greedy_max_min
from csrc_ref.head_importance import head_importance
from csrc_ref.hiprune_select import hiprune_select
from csrc_ref.key_norm_scores import key_norm_scores
from csrc_ref.random_scores import random_scores
from csrc_ref.rotated import rotated
from csrc_ref.score_and_select import score_and_select, score_tokens
from csrc_ref.score_hidden import score_hidden, score_hidden_and_select
from csrc_ref.select_topk import Selection, select_topk

__all__ = [
    "Compacted",
    "Selection",
    "attention_column_mean",
    "cdpruner_quality",
    "compact",
    "dart_select",
    "evenly_spread",
    "fastv_scores",
    "greedy_dpp",
    "greedy_max_min",
    "head_importance",
    "hiprune_select",
    "key_norm_scores",
    "random_scores",
    "rotated",
    "score_and_select",
    "score_hidden",
    "score_hidden_and_select",
    "score_tokens",
    "select_topk",
]
