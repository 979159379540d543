"""FlexAttention with a block mask: blocks of 128 queries by 128 points, empty blocks skipped.

Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels"
(2024), as part of PyTorch.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.baselines.comparison import Comparison, step_problem
from benchmarks.layer import Attend, Layer
from benchmarks.measure import Work, time_calls
from benchmarks.outcome import CaseSkipped
from vicinal import get_multilevel_neighborhoods

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def prepare(layer: Layer) -> Comparison:
    """The attention alone, the mask made beforehand; training where it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=layer.device))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CaseSkipped(f"it needs torch.compile, which does not work here: {reason}") from error
    # Not compiled, it stores some numbers for every query and point.
    compiled = torch.compile(create_block_mask)

    def make_mask() -> BlockMask:
        mask: BlockMask = compiled(
            mask_of(layer), None, None, len(layer), len(layer), str(layer.device)
        )
        return mask

    mask = make_mask()
    seconds = time_calls(make_mask, repeats=1, device=layer.device).median(0)
    vicinal = layer.attention()
    # To try it on the compiled function would make PyTorch give up compiling it, silently.
    few = torch.zeros(1, 1, 16, 16, device=layer.device)
    return Comparison(
        Work(_attention(mask), vicinal.inputs),
        vicinal,
        no_step=step_problem(Work(flex_attention, (few, few, few))),
        extra={
            "mask_seconds": seconds,
            "blocks_skipped_percent": max(0.0, float(mask.sparsity())),
        },
    )


def prepare_sorted(layer: Layer) -> Comparison:
    """Points and queries first sorted along a Z-order curve, for more empty blocks."""
    cells = layer.positions.long()  # of the finest level
    key = torch.zeros_like(cells[:, 0])
    for bit in range(max(layer.pyramid.level_shapes[0]).bit_length()):
        for axis, column in enumerate(cells.unbind(1)):
            key |= (column >> bit & 1) << (bit * cells.shape[1] + axis)
    return prepare(layer.reordered(key.argsort(stable=True)))


def mask_of(layer: Layer) -> MaskMod:
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
