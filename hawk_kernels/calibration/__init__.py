"""Head importance of a model, measured: what each benchmark loses when one head no longer sees the visual tokens."""

from hawk_kernels.calibration.importance import head_importance
from hawk_kernels.calibration.masking import hide_visual_tokens
from hawk_kernels.calibration.result import Calibration
from hawk_kernels.calibration.run import calibrate
from hawk_kernels.calibration.worth import Worth, worth_of_weights
from hawk_kernels.tasks.jsonl import JsonlTask
from hawk_kernels.tasks.samples import BadSamplesError
from hawk_kernels.tasks.sources import load_tasks
from hawk_kernels.tasks.task import Sample, Task

__all__ = [
    "BadSamplesError",
    "Calibration",
    "JsonlTask",
    "Sample",
    "Task",
    "Worth",
    "calibrate",
    "head_importance",
    "hide_visual_tokens",
    "load_tasks",
    "worth_of_weights",
]
