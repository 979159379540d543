"""Images to draw together with the points: intensities or RGB colors."""

import struct
import zlib

import torch
from torch import Tensor

from .._utils.checks import as_tensor, check_tensor, refuse


def to_uint8(image: Tensor) -> Tensor:
    """uint8 ``[H, W]`` or ``[H, W, 3]``, from uint8 or from floating values in [0, 1].

    Raises:
        ValueError: any other shape, dtype or range.
    """
    expected = "[H, W] or [H, W, 3], floating in [0, 1] or uint8"
    image = as_tensor("image", image)
    if not isinstance(image, Tensor) or image.dim() not in (2, 3):
        refuse("image", expected, image)
    check_tensor("image", image, ("H", "W", 3)[: image.dim()])
    image = image.detach().cpu()
    if image.dtype == torch.uint8:
        return image
    if not image.dtype.is_floating_point or not image.numel():
        refuse("image", expected, image)
    if not ((image >= 0) & (image <= 1)).all():
        refuse("image", expected, f"values from {float(image.min()):g} to {float(image.max()):g}")
    return (image.double() * 255).round().to(torch.uint8)


def encode_png(image: Tensor) -> bytes:
    """A uint8 image as PNG; intensities ``[H, W]`` become the opacity of black pixels."""
    if image.dim() == 2:
        image = torch.stack((torch.zeros_like(image), image), 2)
    height, width, channels = image.shape
    color_type = {2: 4, 3: 2}[channels]  # gray with alpha, RGB
    no_filter = image.new_zeros(height, 1)  # the filter byte that precedes every row
    rows = bytes(torch.cat((no_filter, image.flatten(1)), 1).flatten().tolist())
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
