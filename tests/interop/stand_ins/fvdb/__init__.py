"""A stand-in for fVDB: the documented attributes of `GridBatch` and `JaggedTensor`, no more.

Its grids keep each voxel once and in an order of their own, as those of fVDB do.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class JaggedTensor:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        lengths = torch.tensor([0, *map(len, tensors)])
        self.jdata, self.joffsets = torch.cat(list(tensors)), lengths.cumsum(0)

    @classmethod
    def from_data_and_offsets(cls, data: Tensor, offsets: Tensor) -> "JaggedTensor":
        assert int(offsets[-1]) == len(data)
        jagged = cls.__new__(cls)
        jagged.jdata, jagged.joffsets = data, offsets
        return jagged

    @property
    def num_tensors(self) -> int:
        return len(self.joffsets) - 1

    @property
    def jidx(self) -> Tensor:
        """int32 ``[n]``; empty where there is one tensor."""
        lengths = self.joffsets.diff()
        image = torch.arange(self.num_tensors, dtype=torch.int32).repeat_interleave(lengths)
        return image if self.num_tensors > 1 else image[:0]


class GridBatch:
    def __init__(self, rows: Tensor, voxel_sizes: Tensor, origins: Tensor) -> None:
        """``rows`` are distinct: image and ijk."""
        self.grid_count = len(voxel_sizes)
        self.voxel_sizes, self.origins = voxel_sizes, origins
        offsets = torch.bincount(rows[:, 0], minlength=self.grid_count).cumsum(0)
        offsets = torch.nn.functional.pad(offsets, (1, 0))
        self.ijk = JaggedTensor.from_data_and_offsets(rows[:, 1:].int(), offsets)

    @classmethod
    def from_ijk(cls, ijk: JaggedTensor, voxel_sizes: Any = 1, origins: Any = 0) -> "GridBatch":
        rows = _rows(ijk).unique(dim=0)
        rows = rows[(rows[:, 3] % 8).argsort(stable=True)]  # by place within a block
        rows = rows[rows[:, 0].argsort(stable=True)]
        shape = ijk.num_tensors, 3
        return cls(
            rows,
            torch.as_tensor(voxel_sizes, dtype=torch.float32).expand(shape),
            torch.as_tensor(origins, dtype=torch.float32).expand(shape),
        )

    @property
    def total_voxels(self) -> int:
        return len(self.ijk.jdata)

    def jagged_like(self, data: Tensor) -> JaggedTensor:
        assert len(data) == self.total_voxels
        return JaggedTensor.from_data_and_offsets(data, self.ijk.joffsets)

    def ijk_to_index(self, ijk: JaggedTensor, cumulative: bool = False) -> JaggedTensor:
        assert cumulative
        voxels = {tuple(row): index for index, row in enumerate(_rows(self.ijk).tolist())}
        found = [voxels.get(tuple(row), -1) for row in _rows(ijk).tolist()]
        index = torch.tensor(found, dtype=torch.int64)
        return JaggedTensor.from_data_and_offsets(index, ijk.joffsets)


def _rows(ijk: JaggedTensor) -> Tensor:
    """int64 ``[n, 4]``, image and ijk."""
    images = torch.arange(ijk.num_tensors).repeat_interleave(ijk.joffsets.diff())
    return torch.cat((images[:, None], ijk.jdata.long()), 1)
