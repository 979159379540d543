"""An image to draw beside the points: intensities, drawn as ink, or colours."""

import struct
import zlib

import torch
from torch import Tensor

from .._utils.checks import check_tensor, refuse


def as_picture(image: Tensor) -> Tensor:
    """uint8 ``[H, W]`` or ``[H, W, 3]`` from that, or from floating numbers in [0, 1]."""
    expected = "[H, W] or [H, W, 3], floating in [0, 1] or uint8"
    if not isinstance(image, Tensor) or image.dim() not in (2, 3):
        refuse("image", expected, image)
    check_tensor("image", image, ("H", "W", 3)[: image.dim()])
    image = image.detach().cpu()
    if image.dtype == torch.uint8:
        return image
    if not image.dtype.is_floating_point or not image.numel():
        refuse("image", expected, image)
    if not ((image >= 0) & (image <= 1)).all():
        span = f"numbers from {float(image.min()):g} to {float(image.max()):g}"
        refuse("image", expected, span)
    return (image.double() * 255).round().to(torch.uint8)


def encode_png(picture: Tensor) -> bytes:
    """A picture as PNG; of intensities ``[H, W]`` as black that is as opaque as they are high."""
    if picture.dim() == 2:
        picture = torch.stack((torch.zeros_like(picture), picture), 2)
    height, width, channels = picture.shape
    color_type = {2: 4, 3: 2}[channels]
    filters = picture.new_zeros(height, 1)  # none, for every row
    rows = bytes(torch.cat((filters, picture.flatten(1)), 1).flatten().tolist())
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
