"""Stateless (counter-based) random numbers: a hash of a seed and of integer counters.

Every pass and every back end recomputes the same numbers, so none are stored.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW_32_BITS = 2**32 - 1


def hash_integers(seed: Tensor, counters: Sequence[Tensor]) -> Tensor:
    """int64 in ``[0, 2^32)``: a hash of a 64-bit seed and the low 32 bits of ``counters``.

    The counters are integer tensors that broadcast. Each is mixed in with the finalizer of A.
    Appleby's MurmurHash3. All back ends compute the same.
    """
    key = _mix(_mix(seed & _LOW_32_BITS) ^ (seed >> 32 & _LOW_32_BITS))
    for counter in counters:
        key = _mix(key ^ (counter & _LOW_32_BITS))
    return key


def uniform_from_hash(seed: Tensor, counters: Sequence[Tensor]) -> Tensor:
    """float32, uniform in ``[0, 1)``: `hash_integers` scaled."""
    return (hash_integers(seed, counters) >> 8).to(torch.float32) / 2**24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _LOW_32_BITS
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _LOW_32_BITS
    return x ^ (x >> 16)
