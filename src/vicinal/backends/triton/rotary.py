"""Rotary position encoding in Triton.

Angles are sums of products in float64, without matrix units, which would round the coordinates.
They are taken modulo a turn of 2 pi, and all else is float32.
"""

import triton
import triton.language as tl

from .parts import block_and_head, load_pairs, store_pairs

# The first part of a turn has 22 bits, so its product with up to 2^31 turns is exact.
TURN_HIGH, TURN_LOW = tl.constexpr(6.283184051513672), tl.constexpr(1.2556659146019252e-06)
TURNS_PER_RADIAN = tl.constexpr(0.15915494309189533577)


@triton.jit
def load_coordinate(coordinates_ptr, token, valid, axis, n_coordinates):
    """One coordinate of some tokens, float64 ``[BLOCK]``, of ``coordinates_ptr`` ``[n, C]``."""
    ptrs = coordinates_ptr + token * n_coordinates + axis  # [BLOCK]
    return tl.load(ptrs, mask=valid, other=0.0).to(tl.float64)


@triton.jit
def load_frequencies(ptr, axis, head, n_heads, PAIRS: tl.constexpr, PADDED: tl.constexpr):
    """The frequencies of a coordinate and head, float64 ``[PADDED]``; ptr ``[C, H, PAIRS]``."""
    pair = tl.arange(0, PADDED)  # [PADDED]
    row = (axis * n_heads + head) * PAIRS
    return tl.load(ptr + row + pair, mask=pair < PAIRS, other=0.0).to(tl.float64)


@triton.jit
def compute_angles(coordinates_ptr, frequencies_ptr, token, valid, head, n_coordinates, n_heads,
                   PAIRS: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """``coordinates @ frequencies`` of one head, modulo a turn, float32 ``[BLOCK, PADDED]``."""
    angles = tl.zeros([token.shape[0], PADDED], tl.float64)
    for axis in range(n_coordinates):
        coordinate = load_coordinate(coordinates_ptr, token, valid, axis, n_coordinates)  # [BLOCK]
        frequencies = load_frequencies(
            frequencies_ptr, axis, head, n_heads, PAIRS, PADDED
        )  # [PADDED]
        angles += coordinate[:, None] * frequencies[None, :]
    # A Python number is float32 beside a tensor, so each becomes a float64 scalar first.
    turns = tl.floor(angles * tl.full([], TURNS_PER_RADIAN, tl.float64) + 0.5)  # [BLOCK, PADDED]
    angles -= turns * tl.full([], TURN_HIGH, tl.float64)
    angles -= turns * tl.full([], TURN_LOW, tl.float64)
    return angles.to(tl.float32)


@triton.jit(do_not_specialize=("n_tokens",))
def rotate(x_rows, coordinates_ptr, frequencies_ptr, out_rows, n_tokens, n_coordinates, n_heads,
           PAIRS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """See `reference.rotate`. A program rotates one head of a block of tokens.

    Args:
        x_rows, out_rows: Rows ``[n, H, 2 * PAIRS]``.
        coordinates_ptr: floating ``[n, C]``.
        frequencies_ptr: floating ``[C, H, PAIRS]``.
        n_tokens, n_coordinates, n_heads: n, C and H.
        PAIRS: channel pairs of a head.
        PADDED: ``PAIRS`` or more, a power of two.
        BLOCK: tokens of a program.
    """
    token, valid, head = block_and_head(n_tokens, n_heads, BLOCK)  # [BLOCK], [BLOCK], scalar
    angles = compute_angles(
        coordinates_ptr, frequencies_ptr, token, valid, head, n_coordinates, n_heads, PAIRS, PADDED
    )  # [BLOCK, PADDED]
    cos, sin = tl.cos(angles), tl.sin(angles)  # [BLOCK, PADDED]
    even, odd = load_pairs(x_rows, token, valid, head, PAIRS, PADDED)  # [BLOCK, PADDED]
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    store_pairs(
        out_rows, token, valid, head, even * cos - odd * sin, even * sin + odd * cos, PAIRS, PADDED
    )


@triton.jit(do_not_specialize=("n_tokens",))
def rotate_backward(grad_out_rows, out_rows, coordinates_ptr, frequencies_ptr,
                    grad_x_rows, grad_coordinates_ptr, partial_ptr,
                    n_tokens, n_coordinates, n_heads,
                    PAIRS: tl.constexpr, PADDED: tl.constexpr,
                    AXES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The gradients of `rotate`. A program takes all heads of a block of tokens.

    The derivative of the result by its angle is the result rotated by 90 degrees.

    Args:
        grad_out_rows, out_rows, grad_x_rows: Rows ``[n, H, 2 * PAIRS]``.
        coordinates_ptr, grad_coordinates_ptr: floating ``[n, C]``.
        frequencies_ptr: floating ``[C, H, PAIRS]``.
        partial_ptr: float64 ``[blocks, C, H, PAIRS]``, each block's part of the frequencies'
            gradient.
        n_tokens, n_coordinates, n_heads: n, C and H.
        PAIRS: channel pairs of a head.
        PADDED: ``PAIRS`` or more, a power of two.
        AXES: C or more, a power of two.
        BLOCK: tokens of a program.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = token < n_tokens  # [BLOCK]
    axes, pair = tl.arange(0, AXES), tl.arange(0, PADDED)  # [AXES], [PADDED]
    grad_coordinates = tl.zeros([BLOCK, AXES], tl.float32)
    for head in range(n_heads):
        angles = compute_angles(
            coordinates_ptr, frequencies_ptr, token, valid, head,
            n_coordinates, n_heads, PAIRS, PADDED,
        )  # [BLOCK, PADDED]  # fmt: skip
        cos, sin = tl.cos(angles), tl.sin(angles)  # [BLOCK, PADDED]
        even, odd = load_pairs(grad_out_rows, token, valid, head, PAIRS, PADDED)  # [BLOCK, PADDED]
        even, odd = even.to(tl.float32), odd.to(tl.float32)
        store_pairs(
            grad_x_rows, token, valid, head,
            even * cos + odd * sin, odd * cos - even * sin, PAIRS, PADDED,
        )  # fmt: skip
        out_even, out_odd = load_pairs(
            out_rows, token, valid, head, PAIRS, PADDED
        )  # [BLOCK, PADDED]
        out_even, out_odd = out_even.to(tl.float32), out_odd.to(tl.float32)
        grad_angles = odd * out_even - even * out_odd  # [BLOCK, PADDED]
        for axis in range(n_coordinates):
            coordinate = load_coordinate(
                coordinates_ptr, token, valid, axis, n_coordinates
            )  # [BLOCK]
            frequencies = load_frequencies(
                frequencies_ptr, axis, head, n_heads, PAIRS, PADDED
            )  # [PADDED]
            grad = tl.sum(grad_angles * frequencies.to(tl.float32)[None, :], 1)  # [BLOCK]
            grad_coordinates += tl.where(axes[None, :] == axis, grad[:, None], 0.0)
            row = (axis * n_heads + head) * PAIRS
            row += tl.program_id(0).to(tl.int64) * n_coordinates * n_heads * PAIRS
            grad = tl.sum(grad_angles * coordinate.to(tl.float32)[:, None], 0)  # [PADDED]
            tl.store(partial_ptr + row + pair, grad, mask=pair < PAIRS)
    ptrs = grad_coordinates_ptr + token[:, None] * n_coordinates + axes[None, :]  # [BLOCK, AXES]
    tl.store(ptrs, grad_coordinates, mask=valid[:, None] & (axes < n_coordinates)[None, :])
