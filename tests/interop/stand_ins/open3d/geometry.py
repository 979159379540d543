"""Point clouds."""

from collections.abc import Sequence

import numpy as np

from .utility import Vector3dVector


class PointCloud:
    """All vectors are empty at first, see https://www.open3d.org."""

    def __init__(self) -> None:
        self.points = self.colors = self.normals = Vector3dVector(np.zeros((0, 3)))

    def has_colors(self) -> bool:
        return len(self.points) > 0 and len(self.colors) == len(self.points)

    def paint_uniform_color(self, color: Sequence[float]) -> "PointCloud":
        self.colors = Vector3dVector([color] * len(self.points))
        return self
