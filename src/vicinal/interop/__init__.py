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
from .events import from_events
from .hits import from_awkward, from_hdf5, from_zarr, to_awkward
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

__all__ = [
    "from_awkward",
    "from_events",
    "from_hdf5",
    "from_las",
    "from_numpy_cloud",
    "from_open3d",
    "from_pydata_sparse",
    "from_scipy",
    "from_torch_coo",
    "from_torch_csr",
    "from_torch_nested",
    "from_zarr",
    "to_awkward",
    "to_las",
    "to_numpy_cloud",
    "to_open3d",
    "to_pydata_sparse",
    "to_scipy",
    "to_torch_coo",
    "to_torch_csr",
    "to_torch_nested",
]
