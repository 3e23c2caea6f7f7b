"""Choose the backend that a call runs on."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

BACKENDS = {"triton": "hawk_kernels.backends.kernels", "torch": "hawk_kernels.backends.eager"}
MAX_TRITON_HEAD_DIM = 256


@lru_cache(maxsize=1)
def _triton_is_installed() -> bool:
    try:
        return find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


def choose_backend(requested: str | None, device: torch.device, head_dim: int | None = None) -> str:
    """Return the backend that a call runs on: the requested one or an error, else Triton where it can run, else torch.

    Raises:
        ValueError: the name is unknown, or Triton was asked for where it cannot run.
        ImportError: Triton was asked for and is not installed.
    """
    if requested is None:
        fits = head_dim is None or head_dim <= MAX_TRITON_HEAD_DIM
        return "triton" if device.type == "cuda" and fits and _triton_is_installed() else "torch"
    if requested not in BACKENDS:
        raise ValueError(
            f"backend: expected None, 'triton' or 'torch', got {requested!r}; None chooses by device and installation"
        )
    if requested == "triton":
        if not _triton_is_installed():
            raise ImportError("backend='triton' needs Triton, which is not installed: pip install triton")
        if device.type != "cuda" and not _is_interpreting():
            raise ValueError(
                f"backend='triton': expected tensors on a GPU, got device {str(device)!r}; move them there, use "
                "backend='torch', or set TRITON_INTERPRET=1 before the first import of triton to run the interpreter"
            )
        if head_dim is not None and head_dim > MAX_TRITON_HEAD_DIM:
            raise ValueError(
                f"backend='triton': expected head_dim <= {MAX_TRITON_HEAD_DIM}, got {head_dim}; use backend='torch'"
            )
    return requested


@cache
def load_backend(name: str, operator: str) -> ModuleType:
    """Return the module that computes `operator` on a backend, importing it and nothing else on first use."""
    return import_module(f"{BACKENDS[name]}.{operator}")


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Keep autocast off, which would cast the products of float32 scores to half precision."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
