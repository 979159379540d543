"""Conversions from and to the containers of other libraries.

Every function is for one container, and imports the container's library when it is called. Two
kinds of containers come in. Those of cells have a grid of their own. Those of raw points, in meters
or microseconds, are voxelized, so their functions take ``cell_size`` and ``bounds``. All take the
``strides`` of the levels and how points that share a cell are pooled.
"""

from .clouds import (
    from_las,
    from_numpy_cloud,
    from_open3d,
    to_las,
    to_numpy_cloud,
    to_open3d,
)
from .convolution import from_minkowski, from_spconv, to_minkowski, to_spconv
from .events import from_events
from .graphs import from_pyg, to_pyg
from .grids import (
    from_fvdb,
    from_warpconvnet,
    from_warpconvnet_points,
    to_fvdb,
    to_warpconvnet,
    to_warpconvnet_points,
)
from .hits import from_awkward, from_hdf5, from_zarr, to_awkward
from .point_sets import from_pointcept, to_pointcept
from .pydata_sparse import from_pydata_sparse, to_pydata_sparse
from .scipy_sparse import from_scipy, to_scipy
from .torch_sparse import (
    from_torch_coo,
    from_torch_csr,
    from_torch_nested,
    to_torch_coo,
    to_torch_csr,
    to_torch_nested,
)
from .voxel_tensors import from_torchsparse, from_trellis, to_torchsparse, to_trellis

__all__ = [
    "from_awkward",
    "from_events",
    "from_fvdb",
    "from_hdf5",
    "from_las",
    "from_minkowski",
    "from_numpy_cloud",
    "from_open3d",
    "from_pointcept",
    "from_pydata_sparse",
    "from_pyg",
    "from_scipy",
    "from_spconv",
    "from_torch_coo",
    "from_torch_csr",
    "from_torch_nested",
    "from_torchsparse",
    "from_trellis",
    "from_warpconvnet",
    "from_warpconvnet_points",
    "from_zarr",
    "to_awkward",
    "to_fvdb",
    "to_las",
    "to_minkowski",
    "to_numpy_cloud",
    "to_open3d",
    "to_pointcept",
    "to_pydata_sparse",
    "to_pyg",
    "to_scipy",
    "to_spconv",
    "to_torch_coo",
    "to_torch_csr",
    "to_torch_nested",
    "to_torchsparse",
    "to_trellis",
    "to_warpconvnet",
    "to_warpconvnet_points",
]
