"""Rotary position encoding in Triton.

Angles are sums of products in float64, without matrix units, which would round the coordinates.
What is left of them beside whole quarters of a turn is float32, and so is all else. CUDA's sine and
cosine would reduce the angle once more, at several times the cost.
"""

import triton
import triton.language as tl

from .parts import block_and_head, load_pairs, store_pairs

# The first part of a quarter, pi / 2, has 21 bits: its product with up to 2^32 quarters is exact.
QUARTER_HIGH, QUARTER_LOW = tl.constexpr(1.570796012878418), tl.constexpr(3.13916478589249e-07)
QUARTERS_PER_RADIAN = tl.constexpr(0.63661977236758134308)
# A float64 plus this number is rounded to an integer, which its lowest bits then are.
ROUNDING = tl.constexpr(1.5 * 2**52)
# Least largest errors up to pi / 4: 4e-9 of the sine, relative, and 1e-10 of the cosine.
SINE = tl.constexpr((-0.1666665487326482, 0.008332173533187017, -0.0001951665472140346))
COSINE = tl.constexpr((0.04166664674731588, -0.001388736143104515, 2.443772817723659e-05))


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
def compute_rotation(coordinates_ptr, frequencies_ptr, token, valid, head, n_heads,
                     COORDINATES: tl.constexpr,
                     PAIRS: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """Cosine and sine of ``coordinates @ frequencies`` of a head, float32 ``[BLOCK, PADDED]``."""
    angles = tl.zeros([token.shape[0], PADDED], tl.float64)
    for axis in tl.static_range(COORDINATES):
        coordinate = load_coordinate(coordinates_ptr, token, valid, axis, COORDINATES)  # [BLOCK]
        frequencies = load_frequencies(
            frequencies_ptr, axis, head, n_heads, PAIRS, PADDED
        )  # [PADDED]
        angles += coordinate[:, None] * frequencies[None, :]
    # A Python number is float32 beside a tensor, so each becomes a float64 scalar first.
    rounding = tl.full([], ROUNDING, tl.float64)
    rounded = angles * tl.full([], QUARTERS_PER_RADIAN, tl.float64) + rounding  # [BLOCK, PADDED]
    quarters = rounded - rounding
    angles -= quarters * tl.full([], QUARTER_HIGH, tl.float64)
    angles -= quarters * tl.full([], QUARTER_LOW, tl.float64)
    return cos_and_sin(angles.to(tl.float32), rounded.to(tl.int64, bitcast=True).to(tl.int32))


@triton.jit
def cos_and_sin(rest, quarters):
    """Of angles of ``quarters`` of a turn, int32, and a ``rest``, float32, at most pi / 4; each
    has any shape. Only the lowest two bits of the quarters count.
    """
    # A rest beyond that is of an angle too large to be precise, or not finite.
    rest = tl.where(tl.abs(rest) < 1.0, rest, rest * 0.0)
    square = rest * rest
    sine = SINE[0] + square * (SINE[1] + square * SINE[2])
    sine = rest + rest * square * sine
    cosine = COSINE[0] + square * (COSINE[1] + square * COSINE[2])
    cosine = 1.0 + square * (-0.5 + square * cosine)
    is_odd = (quarters & 1) != 0
    cos, sin = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    cos = tl.where(((quarters + 1) & 2) != 0, -cos, cos)
    return cos, tl.where((quarters & 2) != 0, -sin, sin)


@triton.jit(do_not_specialize=("n_tokens",))
def rotate(x_rows, coordinates_ptr, frequencies_ptr, out_rows, n_tokens, n_heads,
           COORDINATES: tl.constexpr, PAIRS: tl.constexpr, PADDED: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """See `reference.rotate`. A program rotates one head of a block of tokens.

    Args:
        x_rows, out_rows: Rows ``[n, H, 2 * PAIRS]``.
        coordinates_ptr: floating ``[n, C]``.
        frequencies_ptr: floating ``[C, H, PAIRS]``.
        n_tokens, n_heads: n and H.
        COORDINATES: C.
        PAIRS: channel pairs of a head.
        PADDED: ``PAIRS`` or more, a power of two.
        BLOCK: tokens of a program.
    """
    token, valid, head = block_and_head(n_tokens, n_heads, BLOCK)  # [BLOCK], [BLOCK], scalar
    cos, sin = compute_rotation(
        coordinates_ptr, frequencies_ptr, token, valid, head, n_heads, COORDINATES, PAIRS, PADDED
    )  # [BLOCK, PADDED] each
    even, odd = load_pairs(x_rows, token, valid, head, PAIRS, PADDED)  # [BLOCK, PADDED]
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    store_pairs(
        out_rows, token, valid, head, even * cos - odd * sin, even * sin + odd * cos, PAIRS, PADDED
    )


@triton.jit(do_not_specialize=("n_tokens",))
def rotate_backward(grad_out_rows, out_rows, coordinates_ptr, frequencies_ptr,
                    grad_x_rows, grad_coordinates_ptr, partial_ptr,
                    n_tokens, n_heads,
                    COORDINATES: tl.constexpr, PAIRS: tl.constexpr, PADDED: tl.constexpr,
                    AXES: tl.constexpr, NEEDS_COORDINATES: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """The gradients of `rotate`. A program takes all heads of a block of tokens.

    The derivative of the result by its angle is the result rotated by 90 degrees.

    Args:
        grad_out_rows, out_rows, grad_x_rows: Rows ``[n, H, 2 * PAIRS]``.
        coordinates_ptr, grad_coordinates_ptr: floating ``[n, C]``.
        frequencies_ptr: floating ``[C, H, PAIRS]``.
        partial_ptr: float64 ``[blocks, C, H, PAIRS]``, each block's part of the frequencies'
            gradient.
        n_tokens, n_heads: n and H.
        COORDINATES: C.
        PAIRS: channel pairs of a head.
        PADDED: ``PAIRS`` or more, a power of two.
        AXES: C or more, a power of two.
        NEEDS_COORDINATES: whether ``grad_coordinates`` is a result.
        BLOCK: tokens of a program.
    """
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = token < n_tokens  # [BLOCK]
    axes, pair = tl.arange(0, AXES), tl.arange(0, PADDED)  # [AXES], [PADDED]
    grad_coordinates = tl.zeros([BLOCK, AXES], tl.float32)
    for head in range(n_heads):
        cos, sin = compute_rotation(
            coordinates_ptr, frequencies_ptr, token, valid, head, n_heads,
            COORDINATES, PAIRS, PADDED,
        )  # [BLOCK, PADDED] each  # fmt: skip
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
        for axis in tl.static_range(COORDINATES):
            coordinate = load_coordinate(
                coordinates_ptr, token, valid, axis, COORDINATES
            )  # [BLOCK]
            if NEEDS_COORDINATES:
                frequencies = load_frequencies(
                    frequencies_ptr, axis, head, n_heads, PAIRS, PADDED
                )  # [PADDED]
                grad = tl.sum(grad_angles * frequencies.to(tl.float32)[None, :], 1)  # [BLOCK]
                grad_coordinates += tl.where(axes[None, :] == axis, grad[:, None], 0.0)
            row = (axis * n_heads + head) * PAIRS
            row += tl.program_id(0).to(tl.int64) * COORDINATES * n_heads * PAIRS
            grad = tl.sum(grad_angles * coordinate.to(tl.float32)[:, None], 0)  # [PADDED]
            tl.store(partial_ptr + row + pair, grad, mask=pair < PAIRS)
    if NEEDS_COORDINATES:
        ptrs = grad_coordinates_ptr + token[:, None] * COORDINATES + axes[None, :]  # [BLOCK, AXES]
        tl.store(ptrs, grad_coordinates, mask=valid[:, None] & (axes < COORDINATES)[None, :])
