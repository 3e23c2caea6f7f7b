"""Benchmarks, and a run over them: what is asked, what an answer is worth, and how hours of asking survive a kill.

A task is samples, prompts and a scorer. It comes from a JSONL file, from lmms-eval or from a function of one's own.
`calibrate` and `evaluate` ask the same tasks in the same way.
"""

from hawk_kernels.tasks.jsonl import JsonlTask
from hawk_kernels.tasks.samples import BadSamplesError
from hawk_kernels.tasks.sources import load_tasks
from hawk_kernels.tasks.task import Sample, Task

__all__ = ["BadSamplesError", "JsonlTask", "Sample", "Task", "load_tasks"]
