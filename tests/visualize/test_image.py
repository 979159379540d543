"""Images that are drawn with the points, and their encoding as PNG."""

import io

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from vicinal.visualize.image import encode_png, to_uint8


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1), (64, 3, 3)])
def test_png_decodes_to_the_image(shape: tuple[int, ...]) -> None:
    image = torch.randint(256, shape, dtype=torch.uint8)
    decoded = imread(io.BytesIO(encode_png(image)))
    back = (decoded * 255).round().astype(np.uint8)
    if len(shape) == 2:
        assert not back[..., :-1].any()
        back = back[..., -1]
    np.testing.assert_array_equal(back, image.numpy())


def test_floating_images_are_rounded() -> None:
    assert to_uint8(torch.tensor([[0, 0.5, 1]])).tolist() == [[0, 128, 255]]
    assert to_uint8(torch.tensor([[0, 128, 255]], dtype=torch.uint8)).tolist() == [[0, 128, 255]]
