"""Random problems, and an oracle: the specification as loops over queries and cells.

This module uses no slices, sorted orders or tiles. The oracle is differentiable, so autograd
gives the expected gradients.
"""

import ctypes
import itertools
import math
import os
import random
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vicinal
from vicinal import (
    Background,
    FeaturePyramid,
    NeighborhoodPlan,
    RotaryEncoding,
    backends,
    neighborhood_attention,
    plan_neighborhoods,
)
from vicinal._utils.types import BackendName

Cell = tuple[int, ...]
Shapes = tuple[Cell, ...]


# ---------------------------------------------------------------------------------- geometry


class Slot(NamedTuple):
    """One of the K cells in a query's windows."""

    level: int
    cell: Cell


def window_slots(position: Tensor, shapes: Shapes, sizes: Sequence[int]) -> list[Slot]:
    """The K slots of one query ``[P]``, in order."""
    exact = position.dtype == torch.float64  # half-precision types use float32
    full = [max(axis) for axis in zip(*shapes, strict=True)]
    slots = []
    for level, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        center = [
            math.floor(p * (s / f) if exact else _float32(_float32(p) * _float32(s / f)))
            for p, s, f in zip(position.tolist(), shape, full, strict=True)
        ]
        radius = (size - 1) // 2
        for offset in itertools.product(range(-radius, radius + 1), repeat=len(shape)):
            cell = tuple(c + o for c, o in zip(center, offset, strict=True))
            slots.append(Slot(level, cell))
    return slots


def _float32(x: float) -> float:
    """``x`` rounded, which makes a float64 product or quotient of float32 numbers a float32 one."""
    return ctypes.c_float(x).value


def is_outside(slot: Slot, shapes: Shapes) -> bool:
    return any(not 0 <= x < size for x, size in zip(slot.cell, shapes[slot.level], strict=True))


# ------------------------------------------------------------------------------------ scenes


@dataclass
class Scene:
    """Queries and points: the inputs of a plan."""

    positions: Tensor  # [N, P]
    offsets: Tensor  # [B + 1]
    pyramid: FeaturePyramid
    sizes: tuple[Any, ...]

    def plan(self, *, check_contents: bool | None = None) -> NeighborhoodPlan:
        return plan_neighborhoods(
            self.positions,
            self.offsets,
            self.pyramid,
            self.sizes,
            check_contents=check_contents,
        )

    def images(self) -> list[int]:
        """The batch index of every query."""
        offsets = self.offsets.tolist()
        return [b for b, (i, j) in enumerate(itertools.pairwise(offsets)) for _ in range(i, j)]

    def windows(self) -> list[list[tuple[Slot, list[int]]]]:
        """The K slots of every query, each with the points in that cell."""
        points = defaultdict(list)
        for index, row in enumerate(self.pyramid.coordinates.tolist()):
            image, *cell, level = row
            points[image, Slot(level, tuple(cell))].append(index)
        return [
            [
                (slot, points[image, slot])
                for slot in window_slots(position, self.pyramid.level_shapes, self.sizes)
            ]
            for image, position in zip(self.images(), self.positions, strict=True)
        ]

    def pairs(self) -> set[tuple[int, int]]:
        """All pairs (query, point) with the point in a window of the query."""
        return {
            (query, point)
            for query, window in enumerate(self.windows())
            for _, points in window
            for point in points
        }


def plan_by_triton(scene: Scene, device: torch.device, **options: Any) -> NeighborhoodPlan:
    """The scene's plan, with the slices of points, by the kernels that plan on a GPU.

    On the CPU, Triton interprets them.
    """
    with mock.patch.dict(backends._BY_DEVICE, {device.type: "triton"}):
        queries = scene.positions.to(device), scene.offsets.to(device)
        plan = plan_neighborhoods(*queries, scene.pyramid.to(device), scene.sizes, **options)
        plan._point_slices()
    return plan


def make_scene(
    shapes: Shapes,
    sizes: Sequence[Any],
    query_counts: Sequence[int],
    n_points: int,
    *,
    seed: int = 0,
    embed_dim: int = 3,
    dtype: torch.dtype = torch.float64,
    distinct: bool = False,
) -> Scene:
    """``query_counts`` queries per image and ``n_points`` points at random cells.

    Half the queries are on cell borders, some outside the map, some at equal positions. Points
    are unsorted and, unless ``distinct``, may share a cell.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch_size = len(query_counts)
    full = [max(axis) for axis in zip(*shapes, strict=True)]
    span = torch.tensor(full, dtype=dtype) + 4
    positions = torch.rand(sum(query_counts), len(full), generator=generator, dtype=dtype)
    positions = positions * span - 2
    positions[::2] = positions[::2].floor()
    positions[3::7] = positions[3:4].clone()
    points = []
    for _ in range(n_points if batch_size else 0):
        level = rng.randrange(len(shapes))
        cell = [rng.randrange(size) for size in shapes[level]]
        points.append([rng.randrange(batch_size), *cell, level])
    if distinct:
        points = [list(point) for point in {tuple(point): None for point in points}]
    coordinates = torch.tensor(points, dtype=torch.int64).reshape(-1, len(full) + 2)
    values = torch.randn(len(points), embed_dim, generator=generator, dtype=dtype)
    offsets = torch.tensor([0, *itertools.accumulate(query_counts)])
    pyramid = FeaturePyramid(values, coordinates, shapes, batch_size)
    return Scene(positions, offsets, pyramid, tuple(sizes))


# Longest axis and widest window per number of dimensions, as the loops of the oracle are slow.
_LONGEST = {1: 40, 2: 9, 3: 5, 4: 3}
_WIDEST = {1: 15, 2: 7, 3: 5, 4: 3}


@st.composite
def scenes(draw: st.DrawFn, max_dim: int = 3) -> Scene:
    """Scenes of up to three levels and images; images, points and queries may be missing."""
    dim = draw(st.integers(1, max_dim))
    axes = st.tuples(*[st.integers(1, _LONGEST[dim])] * dim)
    shapes = tuple(draw(st.lists(axes, min_size=1, max_size=3)))
    radii = st.integers(0, _WIDEST[dim] // 2)
    sizes = [2 * draw(radii) + 1 for _ in shapes]
    counts = draw(st.lists(st.integers(0, 6), max_size=3))
    return make_scene(
        shapes, sizes, counts, draw(st.integers(0, 60)), seed=draw(st.integers(0, 2**16))
    )


def scene_2d(*, n_queries: int = 12, n_points: int = 60, seed: int = 0) -> Scene:
    """A small scene with level ratios of 2/3 and 5/9, an empty image and the finest level last."""
    shapes = ((6, 4), (5, 5), (9, 8))
    return make_scene(shapes, (3, 5, 3), (n_queries // 2, 0, n_queries - n_queries // 2), n_points,
                      seed=seed)  # fmt: skip


def crowded_scene(n_queries: int = 150, n_points: int = 300) -> Scene:
    """A scene of many tiles, with some 20 neighbors per query."""
    return make_scene(
        ((16, 10), (8, 5)), (7, 5), (n_queries // 3, n_queries - n_queries // 3), n_points
    )


def wide_scene() -> Scene:
    """A scene of thousands of queries, which make many chunks of work."""
    return make_scene(((60, 50), (30, 25)), (5, 9), (1500, 2500), 2000)


def full_window_scene(n_queries: int, n_points: int) -> Scene:
    """Every query attends to every point: one image, one level, a window over the whole map."""
    return make_scene(((5, 5),), (17,), (n_queries,), n_points)


def sparse_coo(indices: Tensor, values: Tensor, size: Sequence[int]) -> Tensor:
    """An uncoalesced sparse COO tensor; torch warns unless ``check_invariants`` is given."""
    return torch.sparse_coo_tensor(indices, values, tuple(size), check_invariants=True)


# ---------------------------------------------------------------------------------- attention


class Inputs(NamedTuple):
    """The tensor arguments of `neighborhood_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    background: Background | None = None
    query_mask: Tensor | None = None
    bias: Tensor | None = None

    def leaves(self) -> tuple[Tensor, ...]:
        bias = () if self.bias is None else (self.bias,)
        return (self.q, self.k, self.v, *bias, *(self.background or ()))

    def with_leaves(self, leaves: Sequence[Tensor]) -> "Inputs":
        """The inputs with other tensors in place of `leaves`."""
        q, k, v, *cells = leaves
        bias = None if self.bias is None else cells.pop(0)
        return Inputs(q, k, v, Background(*cells) if cells else None, self.query_mask, bias)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        return self.with_leaves([change(leaf) for leaf in self.leaves()])

    def fresh(self, dtype: torch.dtype | None = None) -> "Inputs":
        """Copies that require gradients and have no ``grad`` yet."""
        return self.map(lambda leaf: leaf.detach().clone().to(dtype or leaf.dtype).requires_grad_())

    def attend(
        self,
        plan: NeighborhoodPlan,
        backend: BackendName,
        *,
        scale: float | None = None,
        dropout_p: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        return neighborhood_attention(
            self.q,
            self.k,
            self.v,
            plan,
            scale=scale,
            dropout_p=dropout_p,
            background=self.background,
            bias=self.bias,
            query_mask=self.query_mask,
            return_lse=True,
            backend=backend,
        )


def make_inputs(
    plan: NeighborhoodPlan,
    *,
    heads: int = 2,
    width: int = 4,
    value_width: int | None = None,
    background: bool = False,
    mask: bool = False,
    bias: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    value_width = width if value_width is None else value_width

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    n, points, levels = plan.n_queries, plan.n_points, plan.n_levels
    q, k = draw(n, heads, width), draw(points, heads, width)
    v = draw(points, heads, value_width)
    cells = None
    if background:
        cells = Background(
            draw(n, levels, heads, width),
            draw(plan.window_slots, heads, width),
            draw(plan.batch_size, levels, heads, value_width),
        )
    query_mask = torch.rand(n, generator=generator) < 0.3 if mask else None
    table = draw(plan.window_slots, heads) if bias else None
    return Inputs(q, k, v, cells, query_mask, table)


class Answer(NamedTuple):
    out: Tensor
    lse: Tensor
    grads: tuple[Tensor, ...]


def differentiate(inputs: Inputs, attend: Callable[[Inputs], tuple[Tensor, Tensor]]) -> Answer:
    """Output, log-sum-exp and the gradients of all leaves for random cotangents of both."""
    inputs = inputs.fresh()
    out, lse = attend(inputs)
    generator = torch.Generator().manual_seed(11)
    weights = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, lse)
    ]
    # The log-sum-exp of a query without neighbors is minus infinity and has no gradient.
    finite_lse = torch.where(lse.isfinite(), lse, 0)
    loss = (out * weights[0]).sum() + (finite_lse * weights[1]).sum()
    loss.backward()
    grads = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs.leaves())
    return Answer(out.detach(), lse.detach(), grads)


def answer(
    inputs: Inputs, plan: NeighborhoodPlan, backend: BackendName = "cpu", *, dropout_p: float = 0.0
) -> Answer:
    """`differentiate` of the op, always with the same seed."""

    def attend(leaves: Inputs) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        return leaves.attend(plan, backend, dropout_p=dropout_p)

    return differentiate(inputs, attend)


def oracle(scene: Scene, inputs: Inputs, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Output ``[N, H, dv]`` and log-sum-exp ``[N, H]``, query by query, cell by cell."""
    q, k, v, background, mask, _ = inputs
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = [], []
    for query, (image, window) in enumerate(zip(scene.images(), scene.windows(), strict=True)):
        unmasked = mask is None or not bool(mask[query])
        neighbors = [point for _, points in window for point in points if unmasked]
        logits, values = (q[query] * k[neighbors]).sum(-1), v[neighbors]
        if background is not None and unmasked:
            empty = [slot for slot, (_, points) in enumerate(window) if not points]
            levels = [window[slot][0].level for slot in empty]
            cells = (background.query[query, levels] * background.key[empty]).sum(-1)
            logits = torch.cat((logits, cells))
            values = torch.cat((values, background.value[image, levels]))
        scores = logits * scale
        out.append((scores.softmax(0)[..., None] * values).sum(0))
        lse.append(scores.logsumexp(0))
    if not out:
        return v.new_zeros(0, *v.shape[1:]) + 0 * v.sum(), q.sum(-1)
    return torch.stack(out), torch.stack(lse)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: object = "") -> None:
    """Equal shapes and dtypes, and no absolute error above ``tolerance`` or NaN."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance, msg=lambda text: f"{what} {text}"
    )


def assert_same_answers(actual: Answer, expected: Answer, tolerance: float) -> None:
    assert_close(actual.out, expected.out, tolerance, "out")
    assert_close(actual.lse, expected.lse, tolerance, "lse")
    for index, pair in enumerate(zip(actual.grads, expected.grads, strict=True)):
        assert_close(*pair, tolerance, f"gradient {index}")


# ----------------------------------------------------------------------------------- rotary


def rotate_by_hand(encoding: RotaryEncoding, x: Tensor, coordinates: Tensor) -> Tensor:
    """``x`` ``[n, H, d]`` rotated at ``coordinates`` ``[n, P + 1]``: pairs as complex numbers."""
    freqs, dim = list(encoding.freqs), encoding.position_dim
    if encoding.axis_scales is not None:
        coordinates = coordinates * torch.tensor([*encoding.axis_scales, 1.0], dtype=x.dtype)
    space, level, everything = slice(0, dim), slice(dim, dim + 1), slice(0, dim + 1)
    groups = {1: [everything], 2: [space, level], 3: [space, level, everything]}[len(freqs)]
    angles = torch.cat(
        [
            torch.einsum("nc,chp->nhp", coordinates[:, group], f.expand(-1, x.shape[1], -1))
            for group, f in zip(groups, freqs, strict=True)
        ],
        -1,
    )
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    rotated = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(rotated).flatten(-2)


# ------------------------------------------------------------------------ inspecting torch


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that any op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return result


class OwnOps(TorchDispatchMode):
    """Records the calls of a back end's ops: name -> (op, arguments)."""

    def __init__(self, namespace: str = "vicinal") -> None:
        super().__init__()
        self.namespace = namespace
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == self.namespace:
            self.calls[func._opname] = func, args
        return func(*args, **(kwargs or {}))


def as_leaves(arguments: tuple[Any, ...], *, requires_grad: bool) -> tuple[Any, ...]:
    """The arguments with every tensor replaced by a leaf."""

    def change(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return [change(part) for part in x]
        if isinstance(x, Tensor):
            x = x.detach().clone()
            return x.requires_grad_(requires_grad and x.is_floating_point())
        return x

    return tuple(change(x) for x in arguments)


def opcheck(op: Any, arguments: Sequence[Any], **options: Any) -> None:
    """``torch.library.opcheck``, which since torch 2.14 reads the gradients of copies that it makes
    and hides the warning of that, but not from a filter that makes warnings errors.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
        results = torch.library.opcheck(op, tuple(arguments), **options)
    assert set(results.values()) == {"SUCCESS"}


def forged(x: Tensor, kind: int, generator: torch.Generator) -> Tensor:
    """Index tensor ``x`` with contents that are invalid in a plan."""
    lowest, highest = -(2**31), 2**31 - 1
    garbage = torch.randint(lowest, highest, x.shape, generator=generator).to(x)
    nearby = x + torch.randint(-3, 4, x.shape, generator=generator).to(x)
    edges = torch.tensor([lowest, highest, -1, x.numel(), 0], dtype=x.dtype)
    extreme = edges[torch.randint(5, x.shape, generator=generator)]
    few = torch.where(torch.rand(x.shape, generator=generator) < 0.1, garbage, x)
    return [x, garbage, nearby, extreme, few][kind]


def run_python(code: str, *, path: Path | None = None, **environment: str) -> str:
    """The output of ``code`` in a fresh interpreter that raises warnings as errors.

    ``code`` can import this module, the tests of back ends, and the library, from ``path`` if
    given.
    """
    library = Path(vicinal.__file__).parents[1] if path is None else path
    tests = Path(__file__).parent
    paths = os.pathsep.join(map(str, (library, tests, tests / "backends")))
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,  # so that a deadlock fails the test
    )
    assert finished.returncode == 0, f"exit {finished.returncode}: {finished.stderr[-2000:]}"
    return finished.stdout


def resident_bytes(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
