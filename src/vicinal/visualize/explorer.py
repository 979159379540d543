"""An interactive HTML page of attention weights that works in any browser, without network."""

import base64
import html
import json
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import refuse
from .._utils.types import CropLike
from ..pyramid import FeaturePyramid
from .files import replace_file
from .image import encode_png, to_uint8
from .outlines import ProjectedWindows
from .palette import DARK, LIGHT, Palette
from .projection import (
    ProjectedRecord,
    check_crop,
    crop_corners,
    project_cells,
    project_record,
)
from .record import AttentionRecord, check_record, check_text

MAX_LEVELS, MAX_SIZE = 255, 2**32  # what the page can number, and draw to a fraction of a pixel
# Typed arrays of JavaScript and their codes in `struct`, the narrowest first. Float64 holds all
# integers up to 2^53.
_INTEGERS = {"Uint8": "B", "Uint16": "H", "Uint32": "I", "Float64": "d"}
_FLOATS = {"Float32": "f", "Float64": "d"}
WEIGHT_STEPS = 2**16 - 1  # a query's largest weight, as a quantized uint16
_SCRIPTS = ("decode.js", "draw.js", "state.js", "details.js", "input.js")


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """One image of an explorer page: its points and the attention weights of its queries.

    Args:
        pyramid: points of all levels.
        records: one record or more, all of the same image, such as one per layer.
        title: name of the image.
        image: ``[H, W]`` intensities, drawn translucent above the points, or ``[H, W, 3]`` colors,
            drawn below them. Floating in [0, 1] or uint8, of any resolution; it is stretched over
            the whole map. None: no image.
        axis: axis to look along, for three dimensions only. Cells that differ in that axis alone
            are drawn as one, with the sum of their weights, and listed apart. None: the one that
            hides the fewest cells.
        axis_names: a name per axis of the pyramid. None: as in `draw_attention`.
        crop: what the page shows before it is zoomed: ``"occupied"`` for the part with points and
            queries, ``"map"`` for the whole map, or ``[2, P]``, its low and high corner in cells
            of the full shape. The rest of the map can be reached.

    Raises:
        ValueError: no records, records of several images or of another pyramid, a ``title`` with
            a lone surrogate, or a ``crop`` without a low corner below a high one.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
        from vicinal.visualize import AttentionRecord, View

        coordinates = torch.cat([torch.zeros(60, 1), torch.randint(0, 16, (60, 2))], 1).long()
        pyramid = FeaturePyramid.from_points(
            coordinates, torch.randn(60, 8), spatial_shape=(16, 16), batch_size=1, strides=(1, 2)
        )
        positions = torch.tensor([[4.5, 4.5], [10.0, 8.0]])
        records = []
        for layer in range(2):
            block = SparseNeighborhoodAttentionBlock(8, 2, n_levels=2, neighborhood_sizes=(3, 5))
            weights = block.attention_weights(
                torch.randn(2, 8), positions, torch.tensor([0, 2]), pyramid
            )
            records.append(
                AttentionRecord(positions, weights, block.neighborhood_sizes, f"layer {layer}")
            )
        view = View(pyramid, records, title="event 12")
        ```
    """

    pyramid: FeaturePyramid
    records: Sequence[AttentionRecord]
    title: str = "image"
    image: Tensor | None = None
    axis: int | None = None
    axis_names: Sequence[str] | None = None
    crop: CropLike = "occupied"

    def __post_init__(self) -> None:
        check_text("title", self.title)
        if not isinstance(self.records, Sequence) or not self.records:
            came = self.records if self.records else "none"
            refuse("records", "a sequence of at least one AttentionRecord", came)
        for record in self.records:
            check_record(record, self.pyramid)
        images = sorted({record.batch_index for record in self.records})
        if len(images) > 1:
            refuse("records", "records of one image", f"records of images {images}")
        object.__setattr__(self, "crop", check_crop(self.crop, self.pyramid.position_dim))


def write_explorer(
    path: str | os.PathLike[str],
    views: View | Sequence[View],
    *,
    title: str = "Attention explorer",
) -> None:
    """Writes an HTML page to explore attention weights: one file without external resources.

    Click a point or a box, or press the arrow keys, to select a query. The page then shows the
    query's windows, the points it attends to and their weights, with one panel per level, for one
    head or the mean over the heads. Windows of every shape are drawn as in `draw_attention`. The
    page zooms from the whole map to a single cell. Cells, positions and boxes are exact. Weights
    are quantized to 16 bits, with an error of at most 1e-5 of the query's largest weight. With 8
    heads and 80 points, a query takes about 2 KB.

    Args:
        path: HTML file to write. An existing file is replaced once the new one is complete.
        views: one image or several to choose from.
        title: title of the page.

    Raises:
        ValueError: ``views`` is empty, an image has an invalid shape, dtype or range, an ``axis``
            is out of range, ``title`` has a lone surrogate, or a pyramid has more than three
            dimensions, 255 levels or 2^32 cells along an axis. No file is written then.
        OSError: the file cannot be written; the error names ``path``, which stays as it was.

    Example:
        ```python
        import tempfile

        from pathlib import Path

        import torch
        from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
        from vicinal.visualize import AttentionRecord, View, write_explorer

        image = torch.rand(16, 16) * torch.rand(16, 16).lt(0.3)
        pixels = image[None].nonzero()  # image 0, row, column
        values = torch.randn(len(pixels), 8)
        pyramid = FeaturePyramid.from_points(pixels, values, image.shape, 1, strides=(1, 2))
        block = SparseNeighborhoodAttentionBlock(8, 2, n_levels=2, neighborhood_sizes=(3, 5))
        positions, offsets = pyramid.positions(), pyramid.batch_offsets()
        weights = block.attention_weights(pyramid.values, positions, offsets, pyramid)
        record = AttentionRecord(
            positions, weights, block.neighborhood_sizes, levels=pyramid.levels
        )
        view = View(pyramid, [record], title="event 12", image=image)
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "attention.html"
            write_explorer(page, view, title="Encoder layer 0")
            print(page.stat().st_size, "bytes")
        ```
    """
    views = [views] if isinstance(views, View) else views
    is_sequence = isinstance(views, Sequence) and len(views) > 0
    if not is_sequence or not all(isinstance(view, View) for view in views):
        refuse("views", "at least one View", views)
    check_text("title", title)
    data = {"weight_steps": WEIGHT_STEPS, "views": [_encode_view(view) for view in views]}
    parts = {
        "title": html.escape(title),
        "palette": _palette_css(LIGHT, DARK),
        "style": _read_asset("style.css"),
        # Escaped, because "</script>" within a label would end the script element.
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "script": "\n".join(_read_asset(name) for name in _SCRIPTS),
    }
    # All placeholders in one pass, because the inserted text may contain placeholders itself.
    template = _read_asset("explorer.html")
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    content = text.encode()
    with replace_file(path) as file:
        file.write(content)


def _check_sizes(pyramid: FeaturePyramid) -> None:
    """Raises ValueError for a pyramid whose levels or cells the page cannot number."""
    if pyramid.n_levels > MAX_LEVELS:
        refuse("pyramid", f"at most {MAX_LEVELS} levels", f"{pyramid.n_levels}")
    largest = max(max(shape) for shape in pyramid.level_shapes)
    if largest > MAX_SIZE:
        refuse("pyramid", f"at most 2^32 ({MAX_SIZE}) cells along an axis", f"{largest}")


def _encode_view(view: View) -> dict[str, Any]:
    """What ``decodeView`` in ``decode.js`` reads."""
    _check_sizes(view.pyramid)
    cells = project_cells(
        view.pyramid, view.records[0].batch_index, view.axis, view.axis_names, merged=False
    )
    projected = [project_record(record, cells) for record in view.records]
    queries = [record.extent(slice(None)) for record in projected]
    image = None
    if view.image is not None:
        pixels = to_uint8(view.image)
        png = base64.b64encode(encode_png(pixels)).decode()
        image = {"url": f"data:image/png;base64,{png}", "is_intensity": pixels.dim() == 2}
    return {
        "title": view.title,
        "level_shapes": cells.level_shapes,
        "axis_names": cells.drawn_names,
        "all_names": cells.axis_names,
        "dropped_axis": cells.projection.dropped_axis,
        "view": crop_corners(view.crop, cells, queries).flatten().tolist(),
        "cells": _encode(cells.cells),
        "depths": _encode(cells.depths),
        "levels": _encode(cells.levels),
        "image": image,
        "records": list(map(_encode_record, view.records, projected)),
    }


def _encode_record(record: AttentionRecord, projected: ProjectedRecord) -> dict[str, Any]:
    """What ``decodeRecord`` in ``decode.js`` reads."""
    weights = projected.weights  # [M, H]
    query = torch.repeat_interleave(projected.offsets.diff())
    pair_max = weights.amax(1) if record.n_heads else weights.new_zeros(len(query))
    query_max = torch.zeros(len(record), dtype=torch.float64)
    query_max = query_max.scatter_reduce(0, query, pair_max, "amax")
    query_max = query_max.float()  # rounded as it is stored, since the page multiplies by it
    divisor = query_max.clamp(min=torch.finfo(torch.float32).tiny)[query, None]
    quantized = (weights / divisor * WEIGHT_STEPS).round().clamp(0, WEIGHT_STEPS)
    dim, background = record.positions.shape[1], projected.background
    return {
        "name": record.name,
        "n_heads": record.n_heads,
        "windows": _encode_windows(projected.windows),
        "positions": _encode(projected.positions),
        "coordinates": _encode(record.positions),
        "sizes": None if record.boxes is None else _encode(record.boxes[:, dim:]),
        "levels": _encode(record.levels),
        "boxes": _encode(projected.boxes),
        "query_names": [record.describe(query) for query in range(len(record))],
        "has_labels": record.labels is not None or record.scores is not None,
        "scores": None if record.scores is None else _encode(record.scores.float()),
        "offsets": _encode(projected.offsets),
        "cell_ids": _encode(projected.cell_ids),
        "query_max": _encode(query_max),
        "weights": _encode(quantized.long()),
        "background": None if background is None else _encode(background.float()),
    }


def _encode_windows(windows: ProjectedWindows | None) -> dict[str, Any] | None:
    """The ``Windows`` of ``decode.js``: the outline is the same for all queries of a level."""
    if windows is None:
        return None
    return {
        "corners": _encode(windows.corners),
        "outlines": [outline.polygons for outline in windows.outlines],
        "causal": [outline.causal for outline in windows.outlines],
        "names": [(name[0], ", ".join(name[1:])) for name in windows.names],
    }


def _encode(x: Tensor | None) -> tuple[str, str] | None:
    """The values in row-major order: the name of a JavaScript type, and base64 of little-endian.

    The type is the narrowest that holds all of the values exactly.
    """
    if x is None:
        return None
    values = x.detach().cpu().flatten()
    name, code = _narrowest_type(values)
    packed = bytearray()
    for part in values.split(2**20):  # lists of Python numbers take much more memory
        packed += struct.pack(f"<{len(part)}{code}", *part.tolist())
    return name, base64.b64encode(packed).decode()


def _narrowest_type(values: Tensor) -> tuple[str, str]:
    """The entry of `_FLOATS` or `_INTEGERS` for ``values`` ``[n]``; integers are not negative."""
    if values.is_floating_point():
        is_exact = bool((values.float().double() == values.double()).all())
        name = "Float32" if is_exact else "Float64"
        return name, _FLOATS[name]
    bits = int(values.max()).bit_length() if len(values) else 0
    fits = (entry for entry in _INTEGERS.items() if bits <= 8 * struct.calcsize(f"<{entry[1]}"))
    return next(fits)


def _palette_css(light: Palette, dark: Palette) -> str:
    """Both palettes as CSS custom properties."""

    def rules(palette: Palette) -> str:
        colors = {name: value for name, value in palette._asdict().items() if name != "weights"}
        colors |= {f"weight-{i}": color for i, color in enumerate(palette.weights)}
        return ":root {" + "".join(f" --{name}: {color};" for name, color in colors.items()) + " }"

    return f"{rules(light)}\n@media (prefers-color-scheme: dark) {{ {rules(dark)} }}"


def _read_asset(name: str) -> str:
    return files(__package__).joinpath("page", name).read_text(encoding="utf-8")
