"""Directions of attention heads in the plane."""

import math

import torch
from torch import Tensor


def ring(n: int) -> Tensor:
    """float32 ``[n, 2]``: unit vectors, equally spaced around the circle."""
    angles = torch.arange(n) * (2 * math.pi / n)
    return torch.stack((angles.sin(), angles.cos()), 1)
