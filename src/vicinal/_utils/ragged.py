"""Rows of all images, one image after another."""

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_ids(offsets: Tensor, n: int) -> Tensor:
    """int64 ``[n]``: the image of every row; image ``b`` has rows ``offsets[b]:offsets[b + 1]``.

    Rows before the first offset have -1, those from the last on the number of images.
    """
    rows = torch.arange(n, device=offsets.device)
    return torch.searchsorted(offsets.long().contiguous(), rows, right=True) - 1


def offsets_from_ids(image: Tensor, batch_size: int) -> Tensor:
    """int64 ``[B + 1]``: where each image begins, of rows that are sorted by ``image`` ``[n]``."""
    counts = torch.bincount(image, minlength=batch_size)
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def offsets_from_counts(counts: Tensor) -> Tensor:
    """int64 ``[n + 1]``: the offsets of ragged rows whose counts are ``counts`` ``[n]``."""
    return F.pad(counts.cumsum(0), (1, 0))
