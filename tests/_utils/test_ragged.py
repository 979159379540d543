"""Ragged batches: offsets, and the batch index of every row."""

import itertools
from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vicinal._utils.ragged import batch_ids, offsets_from_ids


def offsets_from_counts(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)])


@given(st.lists(st.integers(0, 5), max_size=5))
def test_batch_ids_and_offsets_are_inverse(counts: list[int]) -> None:
    offsets = offsets_from_counts(counts)
    ids = batch_ids(offsets, sum(counts))
    assert ids.tolist() == [b for b, count in enumerate(counts) for _ in range(count)]
    torch.testing.assert_close(offsets_from_ids(ids, len(counts)), offsets, rtol=0, atol=0)


def test_batch_ids_of_offsets_of_any_integer_dtype_and_layout() -> None:
    offsets = offsets_from_counts([2, 0, 1])
    for dtype in (torch.int32, torch.int64, torch.uint8):
        assert batch_ids(offsets.to(dtype), 3).tolist() == [0, 0, 2]
    assert batch_ids(torch.stack((offsets, offsets), 1)[:, 0], 3).tolist() == [0, 0, 2]
