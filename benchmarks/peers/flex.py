"""FlexAttention with a block mask: blocks of 128 queries by 128 points, empty blocks skipped.

Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels"
(2024), as PyTorch carries it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.layer import Attend, Layer
from benchmarks.peers.contest import Contest, step_problem
from benchmarks.work import Work
from vicinal import get_multilevel_neighborhoods

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def problem(layer: Layer) -> str | None:
    try:
        compiled = torch.compile(lambda x: x + 1)
        compiled(torch.zeros(8))
    except Exception as error:
        return f"it needs torch.compile, which does not work here: {_first_line(error)}"
    return None


def prepare(layer: Layer) -> Contest:
    """The attention alone, the mask made beforehand; training where it can."""
    start = time.perf_counter()
    mask = block_mask(layer)
    seconds = time.perf_counter() - start
    skipped = max(0.0, float(mask.sparsity()))
    ours = layer.attention()
    theirs = Work(attention(mask), ours.inputs)
    return Contest(
        theirs,
        ours,
        no_step=step_problem(theirs),
        apart={"mask_seconds": seconds, "blocks_skipped_percent": skipped},
    )


def prepare_sorted(layer: Layer) -> Contest:
    """Points and queries first put in the order of a curve through space, for emptier blocks."""
    return prepare(layer.reordered(layer.plan.query_slices.visits.long()))


def block_mask(layer: Layer) -> BlockMask:
    n, device = len(layer), str(layer.x.device)
    return create_block_mask(sees(layer), None, None, n, n, device=device)


def sees(layer: Layer) -> MaskMod:
    """Whether a query sees a point, from the cells its windows are centred on."""
    levels, cells = layer.pyramid.levels, layer.pyramid.cells.unbind(1)
    radius = torch.tensor(layer.scene.windows) // 2
    # A window of one cell is its centre: [N, L] for each axis.
    ones = [1] * layer.pyramid.n_levels
    centers, _, _ = get_multilevel_neighborhoods(layer.positions, layer.pyramid.level_shapes, ones)
    columns = [column.contiguous() for column in centers.unbind(2)]

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, point: Tensor) -> Tensor:
        level = levels[point]
        seen = level >= 0
        for center, cell in zip(columns, cells, strict=True):
            seen = seen & ((center[query, level] - cell[point]).abs() <= radius[level])
        return seen

    return mask_mod


def attention(mask: BlockMask) -> Attend:
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Tensor = compiled(q, k, v, block_mask=mask)
        return out[0].transpose(0, 1)

    return attend


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
