"""Tensors inside a kernel: a pointer and its strides travel as one value.

A kernel takes all pointers in one tuple, the strides that a model has in another, and integers that vary with the
prompt one by one, because Triton's `do_not_specialize` does not reach into a tuple. It puts them together in its first
lines, which costs nothing: tuples are gone before the compiler's first pass.

Triton keys its cache of compiled kernels by the source of jitted functions and knows nothing of these classes. Whoever
changes the order of their fields must also change a function that builds them, or stale kernels may run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Vector(NamedTuple):
    """Elements at a stride; `ptr` points at the first."""

    ptr: Any
    stride: Any


class Matrix(NamedTuple):
    """Rows and columns at strides; `ptr` points at the first element."""

    ptr: Any
    row_stride: Any
    column_stride: Any


@triton.jit
def row_of(matrix, row):
    """One row of a matrix as a vector."""
    return Vector(matrix.ptr + row.to(tl.int64) * matrix.row_stride, matrix.column_stride)


@triton.jit
def load_vector(vector, places, inside):
    """Load the elements at `places`; an element that is not `inside` is 0."""
    return tl.load(vector.ptr + places.to(tl.int64) * vector.stride, mask=inside, other=0)


@triton.jit
def load_tile(matrix, rows, columns, inside):
    """Load `[rows, columns]`; an element that is not `inside` is 0."""
    row_ptrs = matrix.ptr + rows.to(tl.int64)[:, None] * matrix.row_stride
    return tl.load(row_ptrs + columns.to(tl.int64)[None, :] * matrix.column_stride, mask=inside, other=0.0)
