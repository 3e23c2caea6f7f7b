"""Count, on a CPU, what would make the host wait for a GPU."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hawk_kernels
from hawk_kernels.hf import hooks
from hawk_kernels.ops.library import implementations

_PACKAGE = str(Path(hawk_kernels.__file__).parent)
# A watched method of a model is the model's: what it reads is not counted.
_WATCHED = (hooks.__file__, "watched")
# A transfer of a tensor that is on the host already shows nothing to the dispatcher; `.numpy()` only ever follows one.
_TRANSFERS = {torch.Tensor.cpu, torch.Tensor.tolist}
# Operators whose result is a number on the host, or has a shape that depends on values.
_READING = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "repeat_interleave.Tensor",
    "unique_consecutive",
    "unique_dim",
}
_INDEXING = {"index", "index_put", "index_put_"}


class HostReads:
    """Inside the block, lists in `places` each read of a tensor's values by code of the package, as `file: operation`.

    A number (`.item()`, `bool()`), a transfer (`.cpu()`, `.tolist()`), and shapes that depend on values (`nonzero`,
    boolean indexing). What Triton's interpreter does, and what models and tests do, is not counted.
    """

    def __init__(self) -> None:
        self.places: list[str] = []
        self._entered: list[ExitStack] = []

    def __enter__(self) -> HostReads:
        stack = ExitStack()
        stack.enter_context(_Functions(self))
        stack.enter_context(_Operators(self))
        self._entered.append(stack)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().__exit__(*exception)

    def note(self, operation: str) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            path = frame.f_code.co_filename
            if "/triton/runtime/" in path or (path, frame.f_code.co_name) == _WATCHED:
                return
            if path.startswith(_PACKAGE):
                self.places.append(f"{Path(path).name}: {operation}")
                return
            frame = frame.f_back


class _Functions(TorchFunctionMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _TRANSFERS:
            self._reads.note(function.__name__)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "hawk_kernels":
            # modes are off while an operator runs, and ours are the last that may go unwatched
            with self._reads:
                return implementations[operator._opname](*args, **(kwargs or {}))
        name = operator._schema.name.removeprefix("aten::")
        overload = f"{name}.{operator._overloadname}"
        by_mask = name in _INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in _READING or overload in _READING or by_mask:
            self._reads.note(name)
        return operator(*args, **(kwargs or {}))
