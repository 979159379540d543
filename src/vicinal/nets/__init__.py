"""Networks made of the parts of the library, ready to be trained."""

from .unet import PointUNet

__all__ = ["PointUNet"]
