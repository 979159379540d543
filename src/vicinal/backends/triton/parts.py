"""Building blocks of the kernels: access to rows, products, the streaming softmax, dropout.

Names in all kernels: ``..._ptr`` points to a contiguous tensor, ``..._rows`` is a `Rows`, and a
name without either suffix is a block in registers. The comment beside a block is its shape.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


class Rows(NamedTuple):
    """A tensor ``[n, H, width]`` with contiguous channels; rows and heads have any stride."""

    data: Any
    row_stride: int
    head_stride: int


class Dropout(NamedTuple):
    """A weight is dropped if its hash is below ``threshold``, else multiplied by ``factor``."""

    seed: Any  # int64 scalar tensor
    threshold: int  # rate * 2^32
    factor: float  # 1 / (1 - rate)
    copy_points: Any  # int32 [C], the point that each of the last C points is a copy of
    n_copies: int  # C


@triton.jit
def block_and_head(n_rows, n_heads, BLOCK: tl.constexpr):
    """The block of rows and the head of a program whose grid is ``blocks * n_heads``."""
    block, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    return row, row < n_rows, head


@triton.jit
def row_ptrs(rows, index, valid, head, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Pointers to one head of the rows ``index`` ``[n]``, and their mask, ``[n, PADDED]`` each."""
    channel = tl.arange(0, PADDED)  # [PADDED]
    ptrs = rows.data + index.to(tl.int64)[:, None] * rows.row_stride  # [n, 1]
    ptrs += head * rows.head_stride + channel[None, :]  # [n, PADDED]
    mask = valid[:, None] & (channel < WIDTH)[None, :]  # [n, PADDED]
    return ptrs, mask


@triton.jit
def load_rows(rows, index, valid, head, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """``[n, PADDED]``: one head of some rows; zero in the padding and in rows not ``valid``."""
    ptrs, mask = row_ptrs(rows, index, valid, head, WIDTH, PADDED)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_rows(rows, index, valid, head, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Writes ``values`` ``[n, PADDED]`` to one head of the rows that are ``valid``."""
    ptrs, mask = row_ptrs(rows, index, valid, head, WIDTH, PADDED)
    tl.store(ptrs, values.to(rows.data.dtype.element_ty), mask=mask)


@triton.jit
def pair_ptrs(rows, index, valid, head, PAIRS: tl.constexpr, PADDED: tl.constexpr):
    """Pointers to the channel pairs of one head, and their mask, ``[n, PADDED, 2]`` each."""
    pair, member = tl.arange(0, PADDED), tl.arange(0, 2)  # [PADDED], [2]
    ptrs = rows.data + index.to(tl.int64)[:, None, None] * rows.row_stride  # [n, 1, 1]
    ptrs += head * rows.head_stride + 2 * pair[None, :, None] + member[None, None, :]
    mask = valid[:, None, None] & (pair < PAIRS)[None, :, None]  # [n, PADDED, 1]
    mask = mask & (member >= 0)[None, None, :]  # [n, PADDED, 2]; always true, for the shape alone
    return ptrs, mask


@triton.jit
def load_pairs(rows, index, valid, head, PAIRS: tl.constexpr, PADDED: tl.constexpr):
    """``[n, PADDED]`` twice: the even and the odd channels of one head."""
    ptrs, mask = pair_ptrs(rows, index, valid, head, PAIRS, PADDED)
    return tl.split(tl.load(ptrs, mask=mask, other=0.0))


@triton.jit
def store_pairs(rows, index, valid, head, even, odd, PAIRS: tl.constexpr, PADDED: tl.constexpr):
    """Writes ``even`` and ``odd`` ``[n, PADDED]`` to the channel pairs of one head."""
    ptrs, mask = pair_ptrs(rows, index, valid, head, PAIRS, PADDED)
    pairs = tl.join(even, odd).to(rows.data.dtype.element_ty)  # [n, PADDED, 2]
    tl.store(ptrs, pairs, mask=mask)


@triton.jit
def finite_or_zero(x):
    """``x`` of any shape, infinities and NaN replaced by zero."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)


@triton.jit
def dot(a, b):
    """``a @ b`` in float32, of ``[m, n]`` and ``[n, l]``; m is 1, or 16 or more."""
    if a.shape[0] == 1:  # `tl.dot` needs 16 rows or more
        return tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def softmax_step(logits, row_max, row_sum):
    """One block of the streaming softmax.

    Args:
        logits: ``[n, BLOCK]``, to base 2; -inf where a pair is masked.
        row_max, row_sum: ``[n]``, of the blocks before.

    Returns:
        The weights ``[n, BLOCK]``, not normalized; the factor ``[n]`` that rescales what was
        accumulated before; the new ``row_max`` and ``row_sum``.
    """
    new_max = tl.maximum(row_max, tl.max(logits, 1))  # [n]
    # In a row that is masked so far the maximum is -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # [n]
    weights = tl.exp2(logits - shift[:, None])  # [n, BLOCK]
    rescale = tl.exp2(row_max - shift)  # [n]
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def load_lse_and_delta(lse_ptr, delta_ptr, query, valid, head, n_heads):
    """The log-sum-exp, ``delta``, and whether there is any neighbor, of queries; ``[n]`` each."""
    lse = tl.load(lse_ptr + query * n_heads + head, mask=valid, other=-float("inf"))  # [n]
    delta = tl.load(delta_ptr + query * n_heads + head, mask=valid, other=0.0)  # [n]
    return lse, delta, valid & (lse != -float("inf"))


@triton.jit
def _mix_bits(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B).to(tl.uint32)
    x = ((x ^ (x >> 13)) * 0xC2B2AE35).to(tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def point_columns(dropout, point, n_points):
    """The columns of points ``[n]`` for `dropout_factors`: a copy has that of its point."""
    copy = point - (n_points - dropout.n_copies)  # [n]
    column = tl.load(dropout.copy_points + copy, mask=copy >= 0, other=0)  # [n]
    return tl.where(copy >= 0, column, point)


@triton.jit
def dropout_factors(dropout, head, query, column):
    """What dropout multiplies weights by, zero where it drops them.

    A hash of the seed, head, query and column decides, the same as in the reference back end, so
    that the backward pass finds the factors again without storing them.

    Args:
        dropout: the `Dropout`.
        head: the head's index.
        query, column: ``[m, 1]`` and ``[1, n]``, or ``[1, n]`` and ``[m, 1]``. The column of a
            point is its index, see `point_columns`; that of an empty cell, the number of points
            that are no copies plus the cell's slot.

    Returns:
        float32 ``[m, n]``.
    """
    seed = tl.load(dropout.seed)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32 & 0xFFFFFFFF).to(tl.uint32)
    bits = _mix_bits(_mix_bits(low) ^ high)
    bits = _mix_bits(bits ^ head.to(tl.uint32))
    bits = _mix_bits(_mix_bits(bits ^ query.to(tl.uint32)) ^ column.to(tl.uint32))  # [m, n]
    return tl.where(bits.to(tl.int64) >= dropout.threshold, dropout.factor, 0.0)
