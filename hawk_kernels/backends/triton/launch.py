"""What a launch needs beside its kernel: the current device and arrival counters."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch

_COUNTERS_PER_SLAB = 16384
_lock = threading.Lock()
_eager_counters: dict[tuple[int, int], torch.Tensor] = {}
_captured_slabs: dict[int, tuple[torch.Tensor, int]] = {}


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def arrival_counters(num_rows: int, device: torch.device) -> torch.Tensor:
    """Int32 zeros `[>= num_rows]`, one for each row, which the kernel's last arriver sets back to zero.

    Launches of one stream follow each other, so they share counters; two streams never do. A captured launch may be
    replayed on any stream at any time, so it gets counters that no other launch has.
    """
    if device.type != "cuda":
        return torch.zeros(num_rows, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _captured_counters(num_rows, device)
    key = (device.index, torch.cuda.current_stream(device).cuda_stream)
    counters = _eager_counters.get(key)
    if counters is None or counters.numel() < num_rows:
        counters = torch.zeros(max(num_rows, 64), dtype=torch.int32, device=device)
        _eager_counters[key] = counters
    with _lock:
        if device.index not in _captured_slabs:
            _captured_slabs[device.index] = (_new_slab(device), 0)
    return counters


def _new_slab(device: torch.device) -> torch.Tensor:
    return torch.zeros(_COUNTERS_PER_SLAB, dtype=torch.int32, device=device)


def _captured_counters(num_rows: int, device: torch.device) -> torch.Tensor:
    """A slice that is handed out once; where none is left, fresh zeros, at the price of a memset in the graph."""
    with _lock:
        slab, used = _captured_slabs.get(device.index, (None, 0))
        if slab is None or used + num_rows > slab.numel():
            return torch.zeros(num_rows, dtype=torch.int32, device=device)
        _captured_slabs[device.index] = (slab, used + num_rows)
        return slab[used : used + num_rows]
