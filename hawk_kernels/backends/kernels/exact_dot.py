"""Multiplies half-precision rows by float32 vectors, on tensor cores and without loss.

A float32 vector is split into terms of the rows' dtype, 8 bits in each bfloat16 or 11 in each float16, whose sum is the
vector to the last bits of float32. So only the order of the additions differs from that of a float32 product.
"""

import triton
import triton.language as tl


@triton.jit
def _dot(rows, vectors, product, INTERPRETED: tl.constexpr):
    """Return `product + rows @ vectors^T`, float32.

    Triton's interpreter multiplies the bit patterns of bfloat16, and its BLAS adds in another order at the edges of a
    tile, where equal rows would no longer tie.
    """
    vectors = tl.trans(vectors)
    if INTERPRETED:
        return product + tl.sum(rows.to(tl.float32)[:, :, None] * vectors.to(tl.float32)[None, :, :], 1)
    return tl.dot(rows, vectors, product, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def split_in_terms(x, dtype: tl.constexpr, AXIS: tl.constexpr = 0):
    """Return `(unit, high, middle, low)` with `x = unit (high + middle + low)`; the unit is constant along an axis.

    float16 has a narrow range: there the unit makes the largest component 2**14, so that no term is lost below it.
    """
    if dtype == tl.float16:
        largest = tl.max(tl.abs(x), AXIS)
        unit = tl.where(largest == 0, 1.0, largest) * 0.00006103515625
        x = x / tl.expand_dims(unit, AXIS)
    else:
        unit = tl.max(x, AXIS) * 0 + 1.0
    high = x.to(dtype)
    rest = x - high.to(tl.float32)
    middle = rest.to(dtype)
    return unit, high, middle, (rest - middle.to(tl.float32)).to(dtype)


@triton.jit
def exact_dot(rows, vectors, INTERPRETED: tl.constexpr):
    """Return `rows [BLOCK_M, BLOCK_D] @ vectors [BLOCK_H, BLOCK_D]^T` in float32."""
    product = tl.zeros([rows.shape[0], vectors.shape[0]], tl.float32)
    if rows.dtype == tl.float32:
        return _dot(rows, vectors, product, INTERPRETED)
    unit, high, middle, low = split_in_terms(vectors, rows.dtype, 1)
    product = _dot(rows, high, product, INTERPRETED)
    product = _dot(rows, middle, product, INTERPRETED)
    product = _dot(rows, low, product, INTERPRETED)
    return product * unit[None, :]


@triton.jit
def product_of_terms(rows, terms_ptr, term_stride, units_ptr, vector_inside, channel_inside, INTERPRETED: tl.constexpr):
    """Compute `exact_dot` of vectors that are split: `terms [3, ...]`, `units [BLOCK_H]`; float32 has one term."""
    inside = vector_inside[:, None] & channel_inside[None, :]
    product = tl.zeros([rows.shape[0], vector_inside.shape[0]], tl.float32)
    high = tl.load(terms_ptr, mask=inside, other=0.0, cache_modifier=".cg")
    product = _dot(rows, high, product, INTERPRETED)
    if rows.dtype != tl.float32:
        middle = tl.load(terms_ptr + term_stride, mask=inside, other=0.0, cache_modifier=".cg")
        product = _dot(rows, middle, product, INTERPRETED)
        low = tl.load(terms_ptr + 2 * term_stride, mask=inside, other=0.0, cache_modifier=".cg")
        product = _dot(rows, low, product, INTERPRETED)
        product *= tl.load(units_ptr, mask=vector_inside, other=0.0, cache_modifier=".cg")[None, :]
    return product
