"""What kernels of tiles are made of: rows of heads, products, the streamed softmax, dropout."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


class Rows(NamedTuple):
    """A tensor ``[n, H, width]`` whose channels stand side by side."""

    data: Any
    row_stride: int
    head_stride: int


class Dropout(NamedTuple):
    """Weights whose hash is below the threshold are dropped, the others times the factor."""

    seed: Any
    threshold: int
    factor: float


@triton.jit
def load_rows(rows, index, valid, head, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """``[n, PADDED]``: a head of some rows, zero beyond its width and where not ``valid``."""
    channel = tl.arange(0, PADDED)
    place = rows.data + index.to(tl.int64)[:, None] * rows.row_stride
    place += head * rows.head_stride + channel[None, :]
    return tl.load(place, mask=valid[:, None] & (channel < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(rows, index, valid, head, value, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    channel = tl.arange(0, PADDED)
    place = rows.data + index.to(tl.int64)[:, None] * rows.row_stride
    place += head * rows.head_stride + channel[None, :]
    keep = valid[:, None] & (channel < WIDTH)[None, :]
    tl.store(place, value.to(rows.data.dtype.element_ty), mask=keep)


@triton.jit
def pairs_at(rows, index, valid, head, PAIRS: tl.constexpr, PADDED: tl.constexpr):
    """``[n, PADDED, 2]``: where the pairs of a head's channels stand, and which there are."""
    pair, member = tl.arange(0, PADDED), tl.arange(0, 2)
    place = rows.data + index.to(tl.int64)[:, None, None] * rows.row_stride
    place += head * rows.head_stride + 2 * pair[None, :, None] + member[None, None, :]
    exists = valid[:, None, None] & (pair < PAIRS)[None, :, None] & (member >= 0)[None, None, :]
    return place, exists


@triton.jit
def load_pairs(rows, index, valid, head, PAIRS: tl.constexpr, PADDED: tl.constexpr):
    """``[n, PADDED]`` twice: the channels of even number of a head, and those of odd."""
    place, exists = pairs_at(rows, index, valid, head, PAIRS, PADDED)
    return tl.split(tl.load(place, mask=exists, other=0.0))


@triton.jit
def store_pairs(rows, index, valid, head, even, odd, PAIRS: tl.constexpr, PADDED: tl.constexpr):
    place, exists = pairs_at(rows, index, valid, head, PAIRS, PADDED)
    pairs = tl.join(even, odd).to(rows.data.dtype.element_ty)
    tl.store(place, pairs, mask=exists)


@triton.jit
def finite_or_zero(x):
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)


@triton.jit
def dot(a, b):
    """``a @ b`` in float32: ``[m, n]`` and ``[n, l]``, m at least 16 or 1."""
    if a.shape[0] == 1:
        return tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], axis=1)
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def softmax_step(logits, top, total):
    """The next block of a streamed softmax, logits to base 2: weights, and what came before is to
    be multiplied with; the new top and total.
    """
    higher = tl.maximum(top, tl.max(logits, 1))
    # Nothing seen so far: any finite number will do.
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(logits - base[:, None])
    rescale = tl.exp2(top - base)
    return weights, rescale, higher, total * rescale + tl.sum(weights, 1)


@triton.jit
def _mixed(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B).to(tl.uint32)
    x = ((x ^ (x >> 13)) * 0xC2B2AE35).to(tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def kept(dropout, head, query, column):
    """What a weight is multiplied with: zero if it is dropped. See `reference.keep_mask`.

    ``query`` and ``column`` are ``[m, 1]`` and ``[1, n]`` in either order.
    """
    seed = tl.load(dropout.seed)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32 & 0xFFFFFFFF).to(tl.uint32)
    key = _mixed(_mixed(low) ^ high)
    key = _mixed(key ^ head.to(tl.uint32))
    key = _mixed(_mixed(key ^ query.to(tl.uint32)) ^ column.to(tl.uint32))
    return tl.where(key.to(tl.int64) >= dropout.threshold, dropout.factor, 0.0)
