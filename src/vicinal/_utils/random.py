"""Chance that needs no memory: a hash of a seed and of what it is about."""

from collections.abc import Sequence

import torch
from torch import Tensor

_LOW_32_BITS = 2**32 - 1


def hash_integers(seed: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """int64 below 2^32, of a seed of 64 bits and the low 32 bits of integers that broadcast.

    The finaliser of A. Appleby's MurmurHash3, once for every number. All back ends compute the
    same.
    """
    key = _mix(_mix(seed & _LOW_32_BITS) ^ (seed >> 32 & _LOW_32_BITS))
    for number in numbers:
        key = _mix(key ^ (number & _LOW_32_BITS))
    return key


def uniform_from_hash(seed: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    """float32 in [0, 1) likewise."""
    return (hash_integers(seed, numbers) >> 8).to(torch.float32) / 2**24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _LOW_32_BITS
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _LOW_32_BITS
    return x ^ (x >> 16)
