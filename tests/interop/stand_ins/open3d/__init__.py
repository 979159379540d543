"""A stand-in for Open3D: the documented attributes of its `PointCloud`, no more."""

from . import geometry, utility

__all__ = ["geometry", "utility"]
