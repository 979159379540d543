"""NATTEN on the densified map: every cell attends to the window around it, empty or not.

Hassani et al., "Neighborhood Attention Transformer" (2023). It computes something else: each level
sees itself alone, empty cells take part as zeros, and windows do not reach over the border.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from benchmarks.layer import Attend, Layer
from benchmarks.machine import available_memory
from benchmarks.peers.contest import Contest, step_problem
from benchmarks.peers.densify import densified
from benchmarks.work import Work


def problem(layer: Layer) -> str | None:
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed"
    if layer.pyramid.position_dim > 3:
        return "it knows three dimensions at the most"
    cells = max(map(math.prod, layer.pyramid.level_shapes))
    scores = layer.block.n_heads * cells**2 * layer.x.element_size()
    if scores > available_memory():
        return (
            "it has no CPU kernel; without one it stores scores of every two cells of a map, "
            f"{scores / 2**30:,.0f} GiB for {cells:,} cells"
        )
    return None


def prepare(layer: Layer) -> Contest:
    """The attention alone, level by level."""
    ours = layer.attention()
    maps = tuple(densified(layer, x) for x in ours.inputs)
    shapes = layer.pyramid.level_shapes
    theirs = Work(attention(shapes, layer.scene.windows), maps)
    return Contest(
        theirs,
        ours,
        no_step=step_problem(theirs),
        same=False,
        apart={"map_mib": maps[0].nbytes / 2**20},
    )


def attention(shapes: tuple[tuple[int, ...], ...], windows: tuple[int, ...]) -> Attend:
    """Of maps [all levels' cells, H, d]."""
    import natten

    attend_map = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(shapes[0])]
    sizes = [math.prod(shape) for shape in shapes]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        levels = zip(q.split(sizes), k.split(sizes), v.split(sizes), shapes, windows, strict=True)
        return torch.cat(
            [
                attend_map(
                    *(x.unflatten(0, shape)[None] for x in qkv), kernel_size=(width,) * len(shape)
                )[0].flatten(0, len(shape) - 1)
                for *qkv, shape, width in levels
            ]
        )

    return attend
