"""Benchmarks and runs over them: what is asked, how answers are scored, and how a long run survives being killed.

A task is samples, prompts and a scorer. It comes from a JSONL file, from lmms-eval or from a function of your own.
`calibrate` and `evaluate` ask the same tasks in the same way.
"""

from hawk_kernels.tasks.jsonl import JsonlTask
from hawk_kernels.tasks.samples import BadSamplesError
from hawk_kernels.tasks.sources import load_tasks
from hawk_kernels.tasks.task import Sample, Task

__all__ = ["BadSamplesError", "JsonlTask", "Sample", "Task", "load_tasks"]
