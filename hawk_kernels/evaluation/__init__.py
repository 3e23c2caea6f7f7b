"""Compares pruning methods on a user's model and data: how much of the score each keeps, and what it saves."""

from hawk_kernels.evaluation.contenders import Contender
from hawk_kernels.evaluation.result import Evaluation, MethodResult, TaskResult, Unpruned
from hawk_kernels.evaluation.run import evaluate

__all__ = ["Contender", "Evaluation", "MethodResult", "TaskResult", "Unpruned", "evaluate"]
