"""Counter-based random numbers against MurmurHash3's finalizer in Python integers."""

import itertools

import torch
from problems import assert_close

from vicinal._utils.random import hash_integers, uniform_from_hash

MASK = 0xFFFFFFFF
SEEDS = (0, 1, 2**31, 2**32 + 5, 2**61 + 12345, 2**63 - 1)


def finalize(h: int) -> int:
    """The 32-bit finalizer of MurmurHash3, ``fmix32``."""
    h ^= h >> 16
    h = h * 0x85EBCA6B & MASK
    h ^= h >> 13
    h = h * 0xC2B2AE35 & MASK
    return h ^ (h >> 16)


def expected_hash(seed: int, *counters: int) -> int:
    key = finalize(finalize(seed & MASK) ^ (seed >> 32))
    for counter in counters:
        key = finalize(key ^ (counter & MASK))
    return key


def test_the_finalizer_matches_published_values() -> None:
    # The hash of an empty string is the finalizer of its seed.
    assert [finalize(h) for h in (0, 1, MASK)] == [0, 0x514E28B7, 0x81F16F39]


def test_hashes_are_those_of_the_finalizer() -> None:
    counters = (0, 1, 17, 2**31 + 3, 2**32 - 1, 2**32 + 7)
    for seed in SEEDS:
        rows, columns = torch.tensor(counters)[:, None], torch.tensor(counters)
        hashes = hash_integers(torch.tensor(seed), [rows, columns])
        expected = [expected_hash(seed, *pair) for pair in itertools.product(counters, repeat=2)]
        assert hashes.dtype == torch.int64
        assert hashes.flatten().tolist() == expected


def test_uniform_numbers_are_the_high_bits_of_hashes() -> None:
    counter = torch.arange(10_000)
    numbers = uniform_from_hash(torch.tensor(SEEDS[4]), [counter])
    assert numbers.dtype == torch.float32
    expected = [(expected_hash(SEEDS[4], i) >> 8) / 2**24 for i in range(100)]
    assert numbers[:100].tolist() == expected
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
    # In a hundred bins of a hundred numbers each, within five standard deviations.
    counts = torch.histc(numbers, 100, 0, 1)
    assert_close(counts, torch.full((100,), 100.0), 50)


def test_the_dtype_of_counters_does_not_matter() -> None:
    seed, rows = torch.tensor(2**40 + 3), torch.tensor([0, 5, -1, -(2**31), 2**31 - 1])
    expected = hash_integers(seed, (rows, rows[:, None]))
    assert expected.dtype == torch.int64
    assert torch.equal(hash_integers(seed, (rows.int(), rows.int()[:, None])), expected)
    assert torch.equal(hash_integers(seed, (rows % 2**32, rows[:, None])), expected)
