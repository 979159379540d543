"""Conversions from and to the containers of other libraries.

Every function is for one container, and imports the container's library when it is called. Two
kinds of containers come in. Those of cells have a grid of their own. Those of raw points, in meters
or microseconds, are voxelized, so their functions take ``cell_size`` and ``bounds``. All take the
``strides`` of the levels and how points that share a cell are pooled.
"""

from .convolution import from_minkowski, from_spconv, to_minkowski, to_spconv
from .graphs import from_pyg, to_pyg
from .grids import (
    from_fvdb,
    from_warpconvnet,
    from_warpconvnet_points,
    to_fvdb,
    to_warpconvnet,
    to_warpconvnet_points,
)
from .point_sets import from_pointcept, to_pointcept
from .torch_sparse import from_torch_coo, to_torch_coo
from .voxel_tensors import from_torchsparse, from_trellis, to_torchsparse, to_trellis

__all__ = [
    "from_fvdb",
    "from_minkowski",
    "from_pointcept",
    "from_pyg",
    "from_spconv",
    "from_torch_coo",
    "from_torchsparse",
    "from_trellis",
    "from_warpconvnet",
    "from_warpconvnet_points",
    "to_fvdb",
    "to_minkowski",
    "to_pointcept",
    "to_pyg",
    "to_spconv",
    "to_torch_coo",
    "to_torchsparse",
    "to_trellis",
    "to_warpconvnet",
    "to_warpconvnet_points",
]
