"""`FlopCounterMode` counts the attention's products, of pairs that are there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import run_python
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vicinal import (
    Background,
    FeaturePyramid,
    NeighborhoodPlan,
    SparseNeighborhoodAttentionBlock,
    get_multilevel_neighborhoods,
    neighborhood_attention,
    plan_neighborhoods,
)
from vicinal._index.cell_hash import index_cells
from vicinal._utils.types import BackendName
from vicinal.backends import _BACKENDS

SHAPES, SIZES = ((12, 9), (6, 5)), [3, 5]
HEADS, WIDTH, VALUE_WIDTH = 2, 4, 6
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
    pytest.mark.usefixtures("runs_by_reference"),
]


class Scene:
    """Two images, several points in a cell, queries near the edge, and one of no image."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = torch.tensor([[2, *shape, 1] for shape in SHAPES]).repeat_interleave(25, 0)
        points = (torch.rand(50, 4, generator=generator) * sizes).long()
        points[25:, 3] = 1
        points[5:9] = points[4]
        self.pyramid = FeaturePyramid(torch.randn(50, 8), points, SHAPES, batch_size=2)
        self.positions = torch.rand(20, 2, generator=generator) * torch.tensor(SHAPES[0])
        self.positions[3] = torch.nan
        self.offsets = torch.tensor([0, 12, 20])
        self.mask = torch.arange(20) % 7 == 5

    def plan(self) -> NeighborhoodPlan:
        arguments = self.positions, self.offsets, self.pyramid
        return plan_neighborhoods(*arguments, SIZES, check_contents=False)

    def pairs(self, mask: Tensor | None) -> int:
        """With points."""
        return sum(len(points) for points, _ in self._neighborhoods(mask))

    def empty_cells(self, mask: Tensor | None) -> int:
        return sum(n_empty for _, n_empty in self._neighborhoods(mask))

    def _neighborhoods(self, mask: Tensor | None) -> list[tuple[list[int], int]]:
        """The points of each query that is valid and not masked, and how many cells are empty."""
        valid = self.positions.isfinite().all(1) & (~mask if mask is not None else True)
        cells, _, levels = get_multilevel_neighborhoods(self.positions.nan_to_num(), SHAPES, SIZES)
        coordinates, found = self.pyramid.coordinates.tolist(), []
        for query in valid.nonzero()[:, 0].tolist():
            image = int(query >= int(self.offsets[1]))
            slots = [
                [image, *cell, level]
                for cell, level in zip(cells[query].tolist(), levels.tolist(), strict=True)
            ]
            points = [row for row, point in enumerate(coordinates) if point in slots]
            found.append((points, sum(slot not in coordinates for slot in slots)))
        return found


def count(call: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter:
        result = call(*arguments, **options)
    return result, counter.get_total_flops()


def operands() -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(20, HEADS, WIDTH), torch.randn(50, HEADS, WIDTH)
    return q, k, torch.randn(50, HEADS, VALUE_WIDTH)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("masked", [False, True])
def test_pairs_with_points(backend: BackendName, masked: bool) -> None:
    scene = Scene()
    mask, plan = scene.mask if masked else None, scene.plan()
    pairs = scene.pairs(mask)
    assert pairs > 100
    # Which of q, k and v need gradients; products of width d and of width dv, per pair.
    for needs, widths in (("qkv", (3, 2)), ("q", (2, 1)), ("kv", (2, 2))):
        q, k, v = (
            x.requires_grad_(name in needs) for name, x in zip("qkv", operands(), strict=True)
        )
        options: Any = {"query_mask": mask, "backend": backend}
        out, forward = count(neighborhood_attention, q, k, v, plan, **options)
        assert forward == 2 * HEADS * pairs * (WIDTH + VALUE_WIDTH)
        _, backward = count(out.sum().backward)
        per_pair = widths[0] * WIDTH + widths[1] * VALUE_WIDTH
        assert backward == 2 * HEADS * pairs * per_pair


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_empty_cells_with_a_background(backend: BackendName) -> None:
    scene = Scene()
    slots = sum(size**2 for size in SIZES)
    background = Background(
        torch.randn(20, 2, HEADS, WIDTH, requires_grad=True),
        torch.randn(slots, HEADS, WIDTH),
        torch.randn(2, 2, HEADS, VALUE_WIDTH),
    )
    arguments = {"background": background, "query_mask": scene.mask, "backend": backend}
    out, forward = count(neighborhood_attention, *operands(), scene.plan(), **arguments)
    pairs, cells = scene.pairs(scene.mask), scene.empty_cells(scene.mask)
    assert cells > 100
    assert forward == 2 * HEADS * (pairs + cells) * (WIDTH + VALUE_WIDTH)
    _, backward = count(out.sum().backward)
    per_cell = 3 * WIDTH + 2 * VALUE_WIDTH
    assert backward == 2 * HEADS * (pairs * (2 * WIDTH + VALUE_WIDTH) + cells * per_cell)


def test_a_block_counts_projections_and_attention() -> None:
    scene = Scene()
    block = SparseNeighborhoodAttentionBlock(8, 2, 2, SIZES)
    query, n_points = torch.randn(20, 8), len(scene.pyramid)
    call = query, scene.positions.nan_to_num(), scene.offsets, scene.pyramid
    plan = block.make_plan(*call[1:])
    _, flops = count(block, *call, plan=plan)
    projections = 2 * 8 * 8 * (20 + 2 * n_points + 20)
    assert flops == projections + 4 * 8 * len(plan.pairs())


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_sampling_counts_all_corners(backend: BackendName) -> None:
    """Also where they are empty, so that it follows from shapes."""
    with torch.device("meta"):
        index = index_cells(Scene().pyramid.to("meta"))
        table = torch.randn(index.n_cells, HEADS, WIDTH).requires_grad_()
        weights = torch.randn(20, HEADS, 2, 3)
        locations, images = torch.rand(*weights.shape, 2), torch.zeros(20, dtype=torch.int64)
    sample = _BACKENDS[backend].sample
    assert sample is not None
    arguments = table, locations, weights, images, *index.lookup_arguments(), False
    out, forward = count(sample, *arguments)
    assert forward == 2 * weights.numel() * 4 * WIDTH
    assert count(out.sum().backward)[1] == 2 * forward


def test_plans_without_contents_have_no_pairs() -> None:
    plan = Scene().plan().to("meta")
    qkv = [x.to("meta") for x in operands()]
    assert count(neighborhood_attention, *qkv, plan)[1] == 0


def test_compilers_may_count_with_fake_tensors() -> None:
    """As Inductor does to estimate the time of a graph: these have no contents either."""
    plan = Scene().plan()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        qkv = [mode.from_tensor(x) for x in operands()]
        assert count(neighborhood_attention, *qkv, plan)[1] == 0


def test_the_counter_may_be_imported_after_modules_are_made() -> None:
    code = """
import torch
from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
block = SparseNeighborhoodAttentionBlock(8, 2, 1, [3])
points = torch.tensor([[0, 2, 2], [0, 2, 3]])
pyramid = FeaturePyramid.from_points(points, torch.randn(2, 8), (8, 8), 1, strides=1)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    block.encode(pyramid)
print(counter.get_total_flops())
"""
    assert int(run_python(code)) == 2 * 2 * 8 * 8 * 4 + 4 * 8 * 4
