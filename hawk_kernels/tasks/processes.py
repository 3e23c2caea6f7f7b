"""The processes of one run: alone, or those of `accelerate launch` and `torchrun`."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

# the fastest process waits for the slowest one at the end of a job of hours
_PATIENCE = timedelta(days=30)


class Processes:
    """This process among its equals; they meet in a group of their own, on the CPU, whatever device computes.

    A process group that is there already is used, and left alone; else one is made from the environment that a launcher
    sets, and closed at the end of the `with` block.
    """

    def __init__(self) -> None:
        self.rank, self.count = 0, 1
        self._group: Any = None
        self._is_own = False

    def __enter__(self) -> Processes:
        distributed = torch.distributed
        if not distributed.is_available():
            return self
        if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            distributed.init_process_group("gloo", timeout=_PATIENCE)
            self._is_own = True
        if distributed.is_initialized():
            self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
            self._group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_own:
            torch.distributed.destroy_process_group()
        self._group, self._is_own = None, False

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier(group=self._group)


def local_rank() -> int:
    """Return the number of this process on its machine, which is that of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_process() -> bool:
    """Whether this is the process that talks to the user."""
    return int(os.environ.get("RANK", "0")) == 0


def launched_alone() -> bool:
    """Whether `accelerate launch` was asked for several processes and made one, as it does without GPUs."""
    several = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    return several and int(os.environ.get("WORLD_SIZE", "1")) == 1
