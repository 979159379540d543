"""Ragged batches: the rows of all images in one tensor, one image after another."""

import torch
import torch.nn.functional as F
from torch import Tensor


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` for the numbers of rows ``[n]``, none of them negative, by the op whose gradient
    is summed in the same order every time on the device. On a CPU it is also several times as fast.
    """
    return x.index_select(0, rows) if x.device.type == "cpu" else x[rows]


def batch_ids(offsets: Tensor, n: int) -> Tensor:
    """int64 ``[n]``: the image of every row; image ``b`` has rows ``offsets[b]:offsets[b + 1]``.

    It is -1 for rows before the first offset, and the number of images for rows from the last on.
    """
    rows = torch.arange(n, device=offsets.device)
    return torch.searchsorted(offsets.long().contiguous(), rows, right=True) - 1


def offsets_from_counts(counts: Tensor) -> Tensor:
    """int64 ``[n + 1]``: the offsets of ragged rows whose counts are ``counts`` ``[n]``."""
    return F.pad(counts.cumsum(0), (1, 0))


def starts_from_counts(counts: Tensor) -> Tensor:
    """int64 ``[n]``: the offsets of `offsets_from_counts` without the last one."""
    return counts.cumsum(0) - counts


def offsets_from_ids(image: Tensor, batch_size: int) -> Tensor:
    """int64 ``[B + 1]``: the offsets of rows that are sorted by ``image`` ``[n]``.

    Rows of an image below 0 come before the first offset, those of an image from B on after the
    last.
    """
    counts = torch.bincount(image.clamp(-1, batch_size) + 1, minlength=batch_size + 2)
    return counts[: batch_size + 1].cumsum(0)


def rank_in_image(image: Tensor, offsets: Tensor) -> Tensor:
    """int64 ``[n]``: the index of every row within its image, for rows sorted by ``image``."""
    return torch.arange(image.shape[0], device=image.device) - offsets[image]


def expand_ranges(
    starts: Tensor, lengths: Tensor, total: int | None = None
) -> tuple[Tensor, Tensor]:
    """Lists the integers of ranges ``starts[i]:starts[i] + lengths[i]``, int64 ``[M]`` each: the
    range's index ``i``, and the integer. ``total`` is M; giving it saves a synchronization.
    """
    row = torch.repeat_interleave(lengths, output_size=total)
    shift = starts - starts_from_counts(lengths)
    return row, shift[row] + torch.arange(row.shape[0], device=row.device)
