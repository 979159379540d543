"""FlexAttention with a block mask: blocks of 128 queries by 128 points, empty blocks skipped.

Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels"
(2024), as part of PyTorch.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.baselines.comparison import Comparison
from benchmarks.layer import Attend, Layer
from benchmarks.measure import Work
from vicinal import get_multilevel_neighborhoods


def prepare(layer: Layer) -> Comparison:
    """The attention alone, the mask made beforehand; training where it can."""
    # Not compiled, it stores some numbers for every query and point.
    compiled = torch.compile(create_block_mask)

    def make_mask() -> Any:
        return compiled(mask_of(layer), None, None, len(layer), len(layer), str(layer.device))

    mask, vicinal = make_mask(), layer.attention()
    extra = layer.time({"mask": make_mask, "plan": layer.make_plan}, 1).medians()
    extra["blocks_skipped_percent"] = max(0.0, float(mask.sparsity()))
    # To try it on the compiled function would make PyTorch give up compiling it, silently.
    few = torch.zeros(1, 1, 16, 16, device=layer.device)
    try:
        Work(flex_attention, (few, few, few)).step()
    except NotImplementedError as error:
        extra["no_step"] = str(error).split(".")[0].strip()
    return Comparison(Work(_attention(mask), vicinal.inputs), vicinal, extra=extra)


def prepare_sorted(layer: Layer) -> Comparison:
    """Points and queries first sorted along a Z-order curve, for more empty blocks."""
    cells = layer.positions.long()  # of the finest level
    key = torch.zeros_like(cells[:, 0])
    for bit in range(max(layer.pyramid.level_shapes[0]).bit_length()):
        for axis, column in enumerate(cells.unbind(1)):
            key |= (column >> bit & 1) << (bit * cells.shape[1] + axis)
    return prepare(layer.reordered(key.argsort(stable=True)))


def mask_of(layer: Layer) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a point is a query's neighbor, from the cells that its windows are centered on.

    All tables have one dimension: the CPU's compiler takes no others here.
    """
    n, levels = len(layer), layer.pyramid.levels
    # A window of one cell is its center: [N, L] for each axis.
    ones = [1] * layer.pyramid.n_levels
    centers, _, _ = get_multilevel_neighborhoods(layer.positions, layer.pyramid.level_shapes, ones)
    columns = [column.t().flatten() for column in centers.int().unbind(2)]
    cells = [cell.contiguous() for cell in layer.pyramid.cells.int().unbind(1)]
    radius = (torch.tensor(layer.scene.windows, device=levels.device) // 2)[levels]
    first = levels * n  # of the level's centers

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, point: Tensor) -> Tensor:
        row, reach = first[point] + query, radius[point]
        mask = reach >= 0
        for center, cell in zip(columns, cells, strict=True):
            mask = mask & ((center[row] - cell[point]).abs() <= reach)
        return mask

    return mask_mod


def _attention(mask: BlockMask) -> Attend:
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        with warnings.catch_warnings():
            # Without compilation it would be twenty times slower, and only this warning tells.
            warnings.filterwarnings("error", message="flex_attention called without")
            out: Tensor = compiled(q, k, v, block_mask=mask)
        return out[0].transpose(0, 1)

    return attend
