"""NATTEN on the densified map, level by level. It computes something else than the library.

Hassani et al., "Neighborhood Attention Transformer" (2023): every cell attends to its own level.
"""

import math

import torch
from torch import Tensor

from benchmarks.baselines.comparison import Comparison
from benchmarks.baselines.deformable import densified
from benchmarks.layer import Layer
from benchmarks.machine import proc_bytes
from benchmarks.measure import Work
from benchmarks.outcome import CaseSkipped, require


def prepare(layer: Layer) -> Comparison:
    """The attention alone, on two dimensions."""
    require("natten")
    import natten

    shapes, windows = layer.pyramid.level_shapes, layer.scene.windows
    cells = max(map(math.prod, shapes))
    if layer.heads * cells**2 * layer.x.element_size() > proc_bytes("meminfo", "MemAvailable"):
        raise CaseSkipped(f"it has no CPU kernel and stores scores of all pairs of {cells:,} cells")

    def attend(*qkv: Tensor) -> Tensor:
        by_level, outs = [x.split([math.prod(shape) for shape in shapes]) for x in qkv], []
        for *parts, shape, window in zip(*by_level, shapes, windows, strict=True):
            maps = (x.unflatten(0, shape)[None] for x in parts)  # [1, rows, columns, H, d]
            outs.append(natten.na2d(*maps, kernel_size=window)[0].flatten(0, 1))
        return torch.cat(outs)

    vicinal = layer.attention()
    maps = tuple(densified(layer, x) for x in vicinal.inputs)
    return Comparison(Work(attend, maps), vicinal, same=False)
