"""Describes tensors inside a kernel, where a pointer and its strides travel as one value.

A kernel takes all pointers in one tuple and the strides that a model has in another. What varies with the prompt comes
one by one, masks and their strides among it, because Triton's `do_not_specialize` does not reach into a tuple: every
number that is specialised would compile the kernel again in the middle of a chat. Integers that may pass 2**31 are
annotated as `tl.int64`, because their type is part of the key too. The kernel puts them together in its first lines,
which costs nothing: tuples are gone before the compiler's first pass.

Triton keys its cache of compiled kernels by the source of jitted functions and knows nothing of these classes. Whoever
changes the order of their fields must also change a function that builds them, or stale kernels may run.
"""

import math
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


def stride_unit(head_dim: int, *strides: int) -> int:
    """Return the power of two, at most 16, in whose multiples strides between heads and rows of a batch are passed.

    Such a stride is the length of a head times numbers that vary with the prompt. Passed as it is, it would make one
    kernel for even lengths of heads of 72 and another for odd ones; passed in units, it always has a known divisor.
    """
    unit = math.gcd(head_dim, 16)
    return unit if all(stride % unit == 0 for stride in strides) else 1


@triton.jit
def row_of(matrix, row):
    """Return one row of a matrix as a vector."""
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
