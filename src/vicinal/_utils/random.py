"""Stateless (counter-based) random numbers: a hash of a seed and of integer counters.

Every pass and every back end recomputes the same numbers, so none are stored.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW_32_BITS = 2**32 - 1
_CHUNK = 2**15  # elements; torch shares larger tensors among threads
_FACTORS = 0x85EBCA6B, 0xC2B2AE35


def hash_integers(seed: Tensor, counters: Sequence[Tensor]) -> Tensor:
    """int64 in ``[0, 2^32)``: a hash of a 64-bit seed and the low 32 bits of ``counters``.

    The counters are integer tensors that broadcast. Each is mixed in with the finalizer of A.
    Appleby's MurmurHash3. All back ends compute the same.
    """
    key = _mix(_mix(seed & _LOW_32_BITS) ^ (seed >> 32 & _LOW_32_BITS))
    for counter in counters:
        key = _mix(key ^ (counter.long() & _LOW_32_BITS))
    return key


def keep_elements(seed: Tensor, rows: Tensor, n_channels: int, rate: float) -> Tensor:
    """Bool ``[n, n_channels]``: which elements dropout of ``rate`` below 1 keeps; a hash of the
    seed, of integers ``rows`` ``[n]`` and of the channel decides.
    """
    channels = torch.arange(n_channels, device=rows.device)
    return hash_integers(seed, (rows[:, None], channels)) >= int(rate * 2**32)


def keep_elements_in_place(seed: Tensor, rows: Tensor, n_channels: int, rate: float) -> Tensor:
    """The same, several times faster where each op runs by itself.

    It computes in int32, in place; on a CPU in chunks of rows that stay in the cache, of as many
    elements as one thread takes: to share them would take longer.
    """
    n_rows, device = rows.shape[0], rows.device
    chunk = _CHUNK if device.type == "cpu" else max(n_rows * n_channels, 1)
    size = max(1, chunk // max(n_channels, 1))
    channels = torch.arange(n_channels, dtype=torch.int32, device=device)
    keep = torch.empty(n_rows, n_channels, dtype=torch.bool, device=device)
    bits, shifted = torch.empty(2, size, n_channels, dtype=torch.int32, device=device)
    keys = rows.to(torch.int32, copy=True)
    seed_key = hash_integers(seed, ()).int()
    for own in keys.split(chunk):
        _mix_in_place(own.bitwise_xor_(seed_key), torch.empty_like(own))
    for own, kept in zip(keys.split(size), keep.split(size), strict=True):
        x, y = bits[: len(own)], shifted[: len(own)]
        torch.bitwise_xor(own[:, None], channels, out=x)
        _mix_in_place(x, y)
        # As signed numbers, the other way round in the highest bit, they are in the same order.
        torch.ge(x.bitwise_xor_(-(2**31)), int(rate * 2**32) - 2**31, out=kept)
    return keep


def uniform_from_hash(seed: Tensor, counters: Sequence[Tensor]) -> Tensor:
    """float32, uniform in ``[0, 1)``: `hash_integers` scaled."""
    return (hash_integers(seed, counters) >> 8).to(torch.float32) / 2**24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * _FACTORS[0] & _LOW_32_BITS
    x = (x ^ (x >> 13)) * _FACTORS[1] & _LOW_32_BITS
    return x ^ (x >> 16)


def _mix_in_place(x: Tensor, shifted: Tensor) -> None:
    """`_mix` of int32 ``x``, whose bits are those of the numbers in ``[0, 2^32)``; the contents of
    ``shifted``, of the same shape, are lost.
    """
    for bits, factor in zip((16, 13, 16), (*_FACTORS, None), strict=True):
        torch.bitwise_right_shift(x, bits, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_(_LOW_32_BITS >> bits))  # without copies of the sign
        if factor is not None:
            x.mul_(factor - 2**32)
