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
    query_ids: Any  # int32 [N], see `PlanTensors`; None: rows
    column_ids: Any  # int32 [nnz + 1], likewise


@triton.jit
def block_and_head(n_rows, n_heads, BLOCK: tl.constexpr):
    """The block of rows and the head of a program whose grid is ``blocks * n_heads``."""
    block, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    return row, row < n_rows, head


@triton.jit
def row_ptrs(rows, index, head, PADDED: tl.constexpr):
    """Pointers ``[n, PADDED]`` to one head of the rows ``index`` ``[n]``."""
    ptrs = rows.data + head * rows.head_stride + tl.arange(0, PADDED)[None, :]  # [1, PADDED]
    return ptrs + index.to(tl.int64)[:, None] * rows.row_stride


@triton.jit
def channel_mask(WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Which channels of a head are not padding, bool ``[1, PADDED]``."""
    return (tl.arange(0, PADDED) < WIDTH)[None, :]


@triton.jit
def load_all_rows(rows, index, head, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """``[n, PADDED]``: one head of rows ``index``, int32, all valid; zero in the padding."""
    tl.assume(rows.row_stride >= 0)
    # Numbers that are known to be positive are multiplied in one instruction.
    ptrs = row_ptrs(rows, index.to(tl.uint32, bitcast=True), head, PADDED)  # [n, PADDED]
    if WIDTH == PADDED:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=channel_mask(WIDTH, PADDED), other=0.0)


@triton.jit
def load_points(k_rows, v_rows, item, valid, head,
                WIDTH: tl.constexpr, PADDED: tl.constexpr,
                VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                CAREFUL: tl.constexpr):  # fmt: skip
    """Keys ``[BLOCK, PADDED]`` and values ``[BLOCK, VALUE_PADDED]`` of the items ``[BLOCK]``.

    Carefully, those that are not ``valid`` or not finite are zeros. Then a third result, the flags
    ``[BLOCK]``, is NaN where a key or value is not finite, else zero.
    """
    if CAREFUL:
        k = load_rows(k_rows, item, valid, head, WIDTH, PADDED)
        v = load_rows(v_rows, item, valid, head, VALUE_WIDTH, VALUE_PADDED)
        flag = tl.sum(k.to(tl.float32) * 0.0, 1) + tl.sum(v.to(tl.float32) * 0.0, 1)
        # Loading again takes fewer registers than keeping both.
        finite = valid & (flag == 0.0)  # [BLOCK]
        k = load_rows(k_rows, item, finite, head, WIDTH, PADDED)
        v = load_rows(v_rows, item, finite, head, VALUE_WIDTH, VALUE_PADDED)
        return k, v, flag
    else:
        k = load_all_rows(k_rows, item, head, WIDTH, PADDED)
        # Triton 3.6 returns no tuple with None.
        return k, load_all_rows(v_rows, item, head, VALUE_WIDTH, VALUE_PADDED), 0.0


@triton.jit
def load_rows(rows, index, valid, head, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """``[n, PADDED]``: one head of some rows; zero in the padding and in rows not ``valid``."""
    mask = valid[:, None] & channel_mask(WIDTH, PADDED)  # [n, PADDED]
    return tl.load(row_ptrs(rows, index, head, PADDED), mask=mask, other=0.0)


@triton.jit
def store_rows(rows, index, valid, head, values, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Writes ``values`` ``[n, PADDED]`` to one head of the rows that are ``valid``."""
    mask = valid[:, None] & channel_mask(WIDTH, PADDED)  # [n, PADDED]
    values = values.to(rows.data.dtype.element_ty)
    tl.store(row_ptrs(rows, index, head, PADDED), values, mask=mask)


@triton.jit
def load_pairs(rows, index, valid, head, PAIRS: tl.constexpr, PADDED: tl.constexpr):
    """``[n, PADDED]`` twice: the even and the odd channels of one head."""
    # Of pointers to pairs ``[n, PADDED, 2]``, Triton 3.6 gives neighboring threads other rows.
    x = load_rows(rows, index, valid, head, 2 * PAIRS, 2 * PADDED)
    return tl.split(tl.reshape(x, (x.shape[0], PADDED, 2)))


@triton.jit
def store_pairs(rows, index, valid, head, even, odd, PAIRS: tl.constexpr, PADDED: tl.constexpr):
    """Writes ``even`` and ``odd`` ``[n, PADDED]`` to the channel pairs of one head."""
    x = tl.reshape(tl.join(even, odd), (even.shape[0], 2 * PADDED))
    store_rows(rows, index, valid, head, x, 2 * PAIRS, 2 * PADDED)


@triton.jit
def finite_or_zero(x):
    """``x`` of any shape, infinities and NaN replaced by zero."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """``a @ b`` in float32, of ``[m, n]`` and ``[n, l]``; m is 1, or 16 or more.

    ``PRECISION`` tells how float32 is multiplied: "tf32x3" on matrix units, each number as the sum
    of two of TF32, with an error like that of float32; "tf32" as one such number; "ieee" without
    matrix units.
    """
    if a.shape[0] == 1:  # `tl.dot` needs 16 rows or more
        return tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def finite_flag(x):
    """Zeros ``[m]`` if all numbers of a block ``[m, n]`` are finite; else one of them is NaN."""
    return tl.sum(x * 0.0, 1)


@triton.jit
def all_finite(flag):
    """Whether `finite_flag`, or a sum of several, tells that all numbers are finite, a scalar."""
    return tl.sum(flag, 0) == 0.0


@triton.jit
def softmax_step(logits, scale, row_max, row_sum):
    """One block of the streaming softmax.

    Args:
        logits: ``[n, BLOCK]``; -inf where a pair is masked.
        scale: a positive factor that makes them logits to base 2.
        row_max, row_sum: ``[n]``, of the blocks before; the maximum is not scaled.

    Returns:
        The weights ``[n, BLOCK]``, not normalized; the factor ``[n]`` that rescales what was
        accumulated before; the new ``row_max`` and ``row_sum``.
    """
    new_max = tl.maximum(row_max, tl.max(logits, 1))  # [n]
    # In a row that is masked so far the maximum is -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_max == -float("inf"), 0.0, new_max * scale)  # [n]
    weights = tl.exp2(logits * scale - shift[:, None])  # [n, BLOCK]
    rescale = tl.exp2(row_max * scale - shift)  # [n]
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def stats_ptrs(stats_ptr, query, head, n_queries):
    """Pointers ``[n]`` into statistics ``[H, N, 2]``: consecutive queries share a sector.

    The first number is the log-sum-exp to base 2, inf for a query without neighbors, so that its
    weights become zero. The second is ``delta``, zero for such a query.
    """
    return stats_ptr + 2 * (head.to(tl.int64) * n_queries + query)


@triton.jit
def load_stats(stats_ptr, query, valid, head, n_queries):
    """The log-sum-exp to base 2, and ``delta``, of some queries, ``[n]`` each."""
    ptrs = stats_ptrs(stats_ptr, query, head, n_queries)  # [n]
    lse = tl.load(ptrs, mask=valid, other=float("inf"))  # [n]
    return lse, tl.load(ptrs + 1, mask=valid, other=0.0)


@triton.jit
def store_stats(stats_ptr, query, valid, head, n_queries, lse, delta):
    """Writes what `load_stats` loads; here, the log-sum-exp is the natural one.

    Returns:
        The log-sum-exp and ``delta`` as they were written, ``[n]`` each.
    """
    active = lse != -float("inf")  # [n]
    lse = tl.where(active, lse * LOG2_E, float("inf"))
    delta = tl.where(active, delta, 0.0)
    ptrs = stats_ptrs(stats_ptr, query, head, n_queries)  # [n]
    tl.store(ptrs, lse, mask=valid)
    tl.store(ptrs + 1, delta, mask=valid)
    return lse, delta


@triton.jit
def _mix_bits(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B).to(tl.uint32)
    x = ((x ^ (x >> 13)) * 0xC2B2AE35).to(tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def dropout_ids(ids_ptr, row, n_rows):
    """What `dropout_factors` counts rows ``[n]`` as, of which there are ``n_rows``.

    Args:
        ids_ptr: a field of the `Dropout`, or None.
    """
    if ids_ptr is None:
        return row
    else:
        return tl.load(ids_ptr + row, mask=(row >= 0) & (row < n_rows), other=0)


@triton.jit
def cell_columns(dropout, slot, n_points):
    """The columns of empty cells ``[n]`` for `dropout_factors`."""
    if dropout.column_ids is None:
        return n_points + slot
    else:
        return tl.load(dropout.column_ids + n_points) + slot


@triton.jit
def dropout_factors(dropout, head, query, column):
    """What dropout multiplies weights by, zero where it drops them.

    A hash of the seed, head, query and column decides, the same as in the reference back end, so
    that the backward pass finds the factors again without storing them.

    Args:
        dropout: the `Dropout`.
        head: the head's index.
        query, column: ``[m, 1]`` and ``[1, n]``, or ``[1, n]`` and ``[m, 1]``, as `dropout_ids`
            and `cell_columns` return them.

    Returns:
        float32 ``[m, n]``.
    """
    seed = tl.load(dropout.seed)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32 & 0xFFFFFFFF).to(tl.uint32)
    bits = _mix_bits(_mix_bits(low) ^ high)
    bits = _mix_bits(bits ^ head.to(tl.uint32))
    bits = _mix_bits(_mix_bits(bits ^ query.to(tl.uint32)) ^ column.to(tl.uint32))  # [m, n]
    return tl.where(bits.to(tl.int64) >= dropout.threshold, dropout.factor, 0.0)
