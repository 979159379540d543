"""FlexAttention with a block mask: blocks of 128 queries by 128 points, empty blocks skipped.

Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels"
(2024), as PyTorch carries it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.layer import Attend, Layer
from benchmarks.measure import wait_for
from benchmarks.peers.contest import Contest, step_problem
from benchmarks.work import Work
from vicinal import get_multilevel_neighborhoods

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def problem(layer: Layer) -> str | None:
    try:
        compiled = torch.compile(lambda x: x + 1)
        compiled(torch.zeros(8, device=layer.x.device))
    except Exception as error:
        return f"it needs torch.compile, which does not work here: {_first_line(error)}"
    return None


def prepare(layer: Layer) -> Contest:
    """The attention alone, the mask made beforehand; training where it can."""
    # Not compiled, it stores some numbers for every query and point.
    make_mask = torch.compile(create_block_mask)
    arguments = (sees(layer), None, None, len(layer), len(layer), str(layer.x.device))
    make_mask(*arguments)  # compiles it
    wait_for(layer.x.device)
    start = time.perf_counter()
    mask: BlockMask = make_mask(*arguments)
    wait_for(layer.x.device)
    seconds = time.perf_counter() - start
    ours = layer.attention()
    # To try it on the compiled function would make PyTorch give up compiling it, silently.
    few = torch.zeros(1, 1, 16, 16, device=layer.x.device)
    return Contest(
        Work(attention(mask), ours.inputs),
        ours,
        no_step=step_problem(Work(flex_attention, (few, few, few))),
        apart={
            "mask_seconds": seconds,
            "blocks_skipped_percent": max(0.0, float(mask.sparsity())),
        },
    )


def prepare_sorted(layer: Layer) -> Contest:
    """Points and queries first put in the order of a curve through space, for emptier blocks."""
    return prepare(layer.reordered(layer.plan._tensors.query_slices.traversal.long()))


def sees(layer: Layer) -> MaskMod:
    """Whether a query sees a point, from the cells its windows are centred on.

    All tables have one dimension: the CPU's compiler takes no others here.
    """
    n, levels = len(layer), layer.pyramid.levels
    # A window of one cell is its centre: [N, L] for each axis.
    ones = [1] * layer.pyramid.n_levels
    centers, _, _ = get_multilevel_neighborhoods(layer.positions, layer.pyramid.level_shapes, ones)
    columns = [column.t().flatten() for column in centers.int().unbind(2)]
    cells = [cell.contiguous() for cell in layer.pyramid.cells.int().unbind(1)]
    radius = (torch.tensor(layer.scene.windows, device=levels.device) // 2)[levels]
    first = levels * n  # of the level's centres

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, point: Tensor) -> Tensor:
        place, reach = first[point] + query, radius[point]
        seen = reach >= 0
        for center, cell in zip(columns, cells, strict=True):
            seen = seen & ((center[place] - cell[point]).abs() <= reach)
        return seen

    return mask_mod


def attention(mask: BlockMask) -> Attend:
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        with warnings.catch_warnings():
            # Were it not compiled after all, it would be twenty times slower and say only this.
            warnings.filterwarnings("error", message="flex_attention called without")
            out: Tensor = compiled(q, k, v, block_mask=mask)
        return out[0].transpose(0, 1)

    return attend


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
