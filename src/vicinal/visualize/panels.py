"""What the figures are made of. A cell of the full shape is a unit square, rows run down."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.patches import Rectangle
from torch import Tensor

from .flat import Places
from .palette import LIGHT
from .picture import as_picture

WEIGHTS = LinearSegmentedColormap.from_list("weights", LIGHT.weights)


def rectangle(corners: Tensor, **style: Any) -> Rectangle:
    """From low and high corner ``[2, 2]``, row then column."""
    (top, left), (bottom, right) = corners.tolist()
    return Rectangle((left, top), right - left, bottom - top, **style)


def draw_squares(ax: Axes, squares: Tensor, **style: Any) -> PolyCollection:
    """Cells from their corners ``[n, 2, 2]``, as one artist."""
    top, left, bottom, right = squares.flatten(1).t()
    vertices = torch.stack((left, top, right, top, right, bottom, left, bottom), 1)
    array: Any = vertices.view(-1, 4, 2).numpy()  # quick, though the types ask for sequences
    collection = PolyCollection(array, **style)
    ax.add_collection(collection)
    return collection


def as_array(image: Tensor | None) -> Any:
    """What `draw_picture` takes: colours, or ink as opaque as the intensities are high."""
    if image is None:
        return None
    picture = as_picture(image)
    if picture.dim() == 3:
        return picture.numpy()
    ink = torch.tensor(to_rgb(LIGHT.ink)).expand(*picture.shape, 3)
    return torch.cat((ink, picture[..., None] / 255 * 0.35), 2).numpy()


def draw_picture(ax: Axes, array: Any, places: Places) -> None:
    """Colours below the points, ink above them, over the whole of the map."""
    if array is None:
        return
    height, width = places.full_shape
    is_ink = array.shape[2] == 4
    ax.imshow(array, extent=(0, width, height, 0), zorder=3 if is_ink else 0)


def frame(ax: Axes, view: Tensor, *, one_row: bool) -> None:
    """Shows ``view`` ``[2, 2]`` and nothing else; a single row of cells is as high as fits."""
    (top, left), (bottom, right) = view.tolist()
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_aspect("auto" if one_row else "equal")
    ax.tick_params(labelsize=8, color=LIGHT.edge, labelcolor=LIGHT.muted, length=2)
    if one_row:
        ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_color(LIGHT.edge)
