"""Rotary positions in Triton. Angles in the coordinates' dtype, by sums of products one by one."""

import triton
import triton.language as tl

from .parts import load_pairs, store_pairs


@triton.jit
def angles_at(coordinates, frequencies, token, exists, head, n_coordinates, n_heads,
              PAIRS: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """``[BLOCK, PADDED]``: ``coordinates @ frequencies``, ``[n, C]`` and ``[C, H, d / 2]``."""
    pair = tl.arange(0, PADDED)
    angles = tl.zeros([token.shape[0], PADDED], coordinates.dtype.element_ty)
    for axis in range(n_coordinates):
        at = tl.load(coordinates + token * n_coordinates + axis, mask=exists, other=0.0)
        row = (axis * n_heads + head) * PAIRS
        turns = tl.load(frequencies + row + pair, mask=pair < PAIRS, other=0.0)
        angles += at[:, None] * turns[None, :]
    return angles


@triton.jit(do_not_specialize=("n_tokens",))
def rotate(x, coordinates, frequencies, out, n_tokens, n_coordinates, n_heads,
           PAIRS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """See `reference.rotate`."""
    block, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    token = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = token < n_tokens
    angles = angles_at(
        coordinates, frequencies, token, exists, head, n_coordinates, n_heads, PAIRS, PADDED
    )
    cos, sin = tl.cos(angles), tl.sin(angles)
    even, odd = load_pairs(x, token, exists, head, PAIRS, PADDED)
    even, odd = even.to(angles.dtype), odd.to(angles.dtype)
    store_pairs(
        out, token, exists, head, even * cos - odd * sin, even * sin + odd * cos, PAIRS, PADDED
    )


@triton.jit(do_not_specialize=("n_tokens",))
def rotate_backward(grad_out, out, coordinates, frequencies, grad_x, grad_coordinates, partial,
                    n_tokens, n_coordinates, n_heads,
                    PAIRS: tl.constexpr, PADDED: tl.constexpr,
                    AXES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """All heads of a block of tokens: gradients of x and of coordinates, and the block's share of
    the frequencies' ``[blocks, C, H, d / 2]``. The result turned by a right angle is its slope.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = token < n_tokens
    axes, pair = tl.arange(0, AXES), tl.arange(0, PADDED)
    dtype = coordinates.dtype.element_ty
    of_coordinates = tl.zeros([BLOCK, AXES], dtype)
    for head in range(n_heads):
        angles = angles_at(
            coordinates, frequencies, token, exists, head, n_coordinates, n_heads, PAIRS, PADDED
        )
        cos, sin = tl.cos(angles), tl.sin(angles)
        even, odd = load_pairs(grad_out, token, exists, head, PAIRS, PADDED)
        even, odd = even.to(dtype), odd.to(dtype)
        store_pairs(
            grad_x, token, exists, head,
            even * cos + odd * sin, odd * cos - even * sin, PAIRS, PADDED,
        )  # fmt: skip
        turned_even, turned_odd = load_pairs(out, token, exists, head, PAIRS, PADDED)
        slopes = odd * turned_even.to(dtype) - even * turned_odd.to(dtype)
        for axis in range(n_coordinates):
            at = tl.load(coordinates + token * n_coordinates + axis, mask=exists, other=0.0)
            row = (axis * n_heads + head) * PAIRS
            turns = tl.load(frequencies + row + pair, mask=pair < PAIRS, other=0.0)
            share = tl.sum(slopes * turns[None, :], 1)
            of_coordinates += tl.where(axes[None, :] == axis, share[:, None], 0.0)
            row += tl.program_id(0).to(tl.int64) * n_coordinates * n_heads * PAIRS
            tl.store(partial + row + pair, tl.sum(slopes * at[:, None], 0), mask=pair < PAIRS)
    place = grad_coordinates + token[:, None] * n_coordinates + axes[None, :]
    tl.store(place, of_coordinates, mask=exists[:, None] & (axes < n_coordinates)[None, :])
