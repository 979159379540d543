"""Holds the library's answers to a random problem against the loops."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vicinal
from vicinal._utils.types import BackendName, Pooling

from . import loops, maps
from .problem import MOST_SLOTS, Problem, draw_problem
from .windows import Cell

Tensors = dict[str, Tensor]
TOLERANCES: dict[str, tuple[Any, float]] = {  # type of numbers, largest absolute difference
    "reference": (np.float64, 1e-11),
    "cpu": (np.float64, 1e-11),
    "triton": (np.float32, 2e-5),
}
POOLINGS: dict[Pooling, Callable[..., Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "max": torch.amax,
}


class MismatchError(Exception):
    """The library's answer differs from that of the loops."""


class Checker:
    """Checks one problem on one back end, and records the largest difference."""

    def __init__(self, problem: Problem, backend: BackendName, *, gradients: bool) -> None:
        self.problem, self.backend, self.gradients = problem, backend, gradients
        self.dtype = torch.float64 if problem.real is np.float64 else torch.float32
        self.tolerance = TOLERANCES[backend][1]
        self.largest = 0.0
        self.generator = torch.Generator().manual_seed(problem.seed)

    def run(self) -> float:
        """The largest difference found; raises MismatchError for one above the tolerance."""
        self.check_pooling()
        self.check_neighborhoods()
        self.check_sources()
        self.check_functional()
        if self.problem.block is not None:
            self.check_block()
        return self.largest

    # ---------------------------------------------------------------------------- inputs

    def draw(self, *shape: int) -> Tensor:
        """Random numbers in float64 that the problem's type represents."""
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.dtype).double()

    def positions(self) -> Tensor:
        p = self.problem
        return torch.tensor(p.positions, dtype=self.dtype).view(-1, p.dim)

    def query_levels(self) -> Tensor | None:
        levels = self.problem.query_levels
        return None if levels is None else torch.tensor(levels, dtype=torch.int64)

    def pyramid(self, values: Tensor) -> vicinal.FeaturePyramid:
        p = self.problem
        return vicinal.FeaturePyramid(
            values,
            torch.tensor(p.coordinates, dtype=torch.int64).view(-1, p.dim + 2),
            p.shapes,
            p.map_images,
            strides=p.strides,
            periodic_axes=p.periodic_axes,
        )

    # ------------------------------------------------------------------------ comparison

    def compare(self, what: str, actual: Tensor, expected: Tensor) -> None:
        if actual.shape != expected.shape:
            raise MismatchError(f"{what}: {list(actual.shape)} instead of {list(expected.shape)}")
        actual, expected = actual.detach().double(), expected.detach().double()
        different = actual != expected  # equal infinities differ by NaN
        difference = torch.where(different, (actual - expected).abs(), 0.0)
        worst = float(difference.max()) if difference.numel() else 0.0
        if not worst <= self.tolerance:
            raise MismatchError(f"{what}: {worst:.3g} away")
        self.largest = max(self.largest, worst)

    def equal(self, what: str, actual: object, expected: object) -> None:
        if actual != expected:
            raise MismatchError(f"{what}: {actual} instead of {expected}"[:1000])

    def compare_gradients(
        self,
        what: str,
        ours: tuple[tuple[Tensor, ...], Tensors],
        expected: tuple[tuple[Tensor, ...], Tensors],
    ) -> None:
        """Of results and named inputs, for random cotangents of the results."""
        if not self.gradients:
            return
        cotangents = [self.draw(*x.shape) for x in expected[0]]
        found = [
            torch.autograd.grad(
                sum_products(results, cotangents, inputs),
                list(inputs.values()),
                allow_unused=True,
                materialize_grads=True,
            )
            for results, inputs in (ours, expected)
        ]
        for name, left, right in zip(ours[1], *found, strict=True):
            self.compare(f"{what}, gradient of {name}", left, right)

    def leaves(self, tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
        """The tensors as leaves of the problem's type, and of float64."""
        ours = {name: x.to(self.dtype).requires_grad_() for name, x in tensors.items()}
        loops_own = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        return ours, loops_own

    # ---------------------------------------------------------------------------- checks

    def check_pooling(self) -> None:
        """`FeaturePyramid.from_points` against a loop over raw points."""
        p = self.problem
        if p.raw_points is None:
            return
        assert p.strides is not None
        features = self.draw(len(p.raw_points), 3)
        members: dict[Cell, list[int]] = defaultdict(list)
        for row, (image, *cell) in enumerate(p.raw_points):
            for level, steps in enumerate(p.strides):
                pooled = (x // step for x, step in zip(cell, steps, strict=True))
                members[(image, *pooled, level)].append(row)
        points = torch.tensor(p.raw_points, dtype=torch.int64).view(-1, p.dim + 1)
        for pooling, reduce in POOLINGS.items():
            pyramid = vicinal.FeaturePyramid.from_points(
                points,
                features.to(self.dtype),
                p.raw_shape,
                p.map_images,
                strides=p.strides,
                pooling=pooling,
                periodic_axes=p.periodic_axes,
                keep_point_rows=True,
            )
            self.equal("level shapes", pyramid.level_shapes, p.shapes)
            rows = list(map(tuple, pyramid.coordinates.tolist()))
            self.equal("pooled cells", rows, p.coordinates)
            values = [reduce(features[members[row]], 0)[None] for row in rows]
            self.compare(pooling, pyramid.values, torch.cat([features[:0], *values]))
            assert pyramid.point_rows is not None
            for point, kept in enumerate(pyramid.point_rows.tolist()):
                for level, row in enumerate(kept):
                    self.equal("point rows", point in members[rows[row]], True)
                    self.equal("point rows", rows[row][-1], level)

    def check_neighborhoods(self) -> None:
        """`get_multilevel_neighborhoods` against the cells of the loops."""
        p = self.problem
        if any(abs(x) > 2.0**62 for position in p.positions for x in position):
            return  # cells that int64 cannot hold
        cells, outside, levels = vicinal.get_multilevel_neighborhoods(
            self.positions(),
            p.shapes,
            p.neighborhood_sizes,
            query_level_indices=self.query_levels(),
            periodic_axes=p.periodic_axes,
        )
        for query in range(len(p.positions)):
            slots = list(loops.window_cells(p, query))
            wrapped = [loops.wrap_cell(p, *slot) for slot in slots]
            self.equal("cells", list(map(tuple, cells[query].tolist())), wrapped)
            beyond = [
                loops.is_outside(p, level, cell)
                for (level, _), cell in zip(slots, wrapped, strict=True)
            ]
            self.equal("outside", outside[query].tolist(), beyond)
            self.equal("levels", levels.tolist(), [level for level, _ in slots])

    def check_sources(self) -> None:
        """`positions()`, and the points of `from_coo` and `from_levels`."""
        p = self.problem
        values = self.draw(len(p.coordinates), 2).to(self.dtype)
        pyramid = self.pyramid(values)
        centers = [loops.cell_center(p, row[-1], row[1:-1])[:-1] for row in p.coordinates]
        expected = torch.tensor(centers, dtype=torch.float64).view(-1, p.dim)
        self.compare("positions()", pyramid.positions(self.dtype), expected)
        sums: dict[Cell, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=self.dtype))
        for row, value in zip(p.coordinates, values, strict=True):
            sums[row] = sums[row] + value
        geometry: dict[str, Any] = {"strides": p.strides, "periodic_axes": p.periodic_axes}
        levels = [maps.level_map(p, values, level) for level in range(len(p.shapes))]
        coo = maps.coo_map(p, values)
        sources = {
            "from_coo": vicinal.FeaturePyramid.from_coo(coo, p.shapes, **geometry),
            "from_levels": vicinal.FeaturePyramid.from_levels(levels, **geometry),
        }
        for name, source in sources.items():
            self.equal(f"{name}: level shapes", source.level_shapes, p.shapes)
            rows = list(map(tuple, source.coordinates.tolist()))
            self.equal(f"{name}: points", sorted(rows), sorted(sums))
            for row, value in zip(rows, source.values, strict=True):
                self.compare(f"{name}: values", value, sums[row])

    def check_functional(self) -> None:
        """The plan, and `neighborhood_attention` with it."""
        p = self.problem
        pyramid = self.pyramid(self.draw(len(p.coordinates), 1).to(self.dtype))
        plan = vicinal.plan_neighborhoods(
            self.positions(),
            torch.tensor(p.offsets),
            pyramid,
            p.neighborhood_sizes,
            self.query_levels(),
        )
        wanted = Counter(
            (query, point)
            for query, slots in enumerate(loops.windows(p))
            for slot in slots
            for point in slot.points
        )
        self.equal("pairs", Counter(map(tuple, plan.pairs().tolist())), wanted)
        self.equal("counts", sum(plan.counts().tolist()), wanted.total())
        key_rows = {(point, row[1:-1]): point for point, row in enumerate(p.coordinates)}
        for copy, (point, shift) in enumerate(zip(*map(Tensor.tolist, plan.copies), strict=True)):
            cell = p.coordinates[point][1:-1]
            moved = tuple(x + step for x, step in zip(cell, shift, strict=True))
            key_rows[point, moved] = len(p.coordinates) + copy
        self.equal("distinct copies", len(key_rows), plan.n_keys)
        ours, expected = self.leaves(self.draw_functional(plan.n_keys, plan.batch_size))
        factor = 0.7 if p.seed % 2 else p.head_dim**-0.5
        cells = [ours[name] for name in ("cell_query", "cell_key", "cell_value") if name in ours]
        options: dict[str, Any] = {
            "scale": factor if p.seed % 2 else None,
            "background": vicinal.Background(*cells) if cells else None,
            "bias": ours.get("bias"),
            "query_mask": None if p.mask is None else torch.tensor(p.mask, dtype=torch.bool),
        }
        q, k, v = ours["q"], ours["k"], plan.append_copies(ours["v"])
        results = vicinal.neighborhood_attention(
            q, k, v, plan, **options, return_lse=True, backend=self.backend
        )
        *answers, weights = loops.functional(p, expected, key_rows, factor)
        found = vicinal.neighborhood_attention_weights(q, k, plan, **options)
        self.compare("weights", self.dense_weights(found), weights)
        self.compare("attention", results[0], answers[0])
        self.compare("log-sum-exp", results[1], answers[1])
        self.compare_gradients("attention", (results, ours), (tuple(answers), expected))

    def dense_weights(self, weights: vicinal.NeighborhoodWeights) -> Tensor:
        """``[N, nnz + L, H]``, of all points, then of all empty cells of each level."""
        p, counts = self.problem, weights.offsets.diff()
        queries = torch.repeat_interleave(torch.arange(len(counts)), counts)
        dense = torch.zeros(len(counts), len(p.coordinates), p.heads, dtype=self.dtype)
        dense[queries, weights.points] = weights.weights.detach()
        empty = dense.new_zeros(len(counts), len(p.shapes), p.heads)
        return torch.cat((dense, empty if weights.background is None else weights.background), 1)

    def draw_functional(self, n_keys: int, images: int) -> Tensors:
        p = self.problem
        n, heads, levels = len(p.positions), (p.heads, p.head_dim), len(p.shapes)
        width = p.head_dim + p.seed % 3  # of values
        tensors = {
            "q": self.draw(n, *heads),
            "k": self.draw(n_keys, *heads),
            "v": self.draw(len(p.coordinates), p.heads, width),
        }
        if p.background:
            tensors["cell_query"] = self.draw(n, levels, *heads)
            tensors["cell_key"] = self.draw(p.n_slots, *heads)
            tensors["cell_value"] = self.draw(images, levels, p.heads, width)
        if p.bias:
            tensors["bias"] = self.draw(p.n_slots, p.heads)
        return tensors

    def check_block(self) -> None:
        """`SparseNeighborhoodAttentionBlock` with all its parameters."""
        p = self.problem
        assert p.block is not None
        torch.manual_seed(p.seed)
        block = vicinal.SparseNeighborhoodAttentionBlock(
            p.embed_dim,
            p.heads,
            len(p.shapes),
            p.neighborhood_sizes,
            p.dim,
            backend=self.backend,
            **p.block,
        ).to(self.dtype)
        own = {name: x.detach().double() for name, x in block.named_parameters()}
        for name in ("norm.weight", "norm.bias"):
            own[name] = own[name] + 0.3 * self.draw(p.embed_dim)
        if "relative_bias" in own:
            own["relative_bias"] = self.draw(p.n_slots, p.heads)
        tensors = {
            "query": self.draw(len(p.positions), p.embed_dim),
            "positions": self.positions().double(),
            "values": self.draw(len(p.coordinates), p.point_dim),
        }
        if p.background:
            tensors["background"] = self.draw(p.background_rows, len(p.shapes), p.point_dim)
        ours, expected = self.leaves(tensors)
        parameters, expected_parameters = self.leaves(own)
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                parameter.copy_(parameters[name])
        parameters = dict(block.named_parameters())
        out = block(**self.block_arguments(block, ours))
        answer = loops.block(*maps.stored(p, expected), expected_parameters)
        self.compare("block", out, answer)
        self.compare_gradients(
            "block", ((out,), ours | parameters), ((answer,), expected | expected_parameters)
        )

        if len(p.coordinates) * p.n_slots < MOST_SLOTS and p.point_dim == p.embed_dim:
            self.check_encode(block, expected_parameters)

    def check_encode(self, block: Any, parameters: Tensors) -> None:
        """`encode`, where every point is a query, whatever the order of the points."""
        rows = sorted(range(len(self.problem.coordinates)), key=self.image_of_point)
        p = dataclasses.replace(
            self.problem,
            coordinates=[self.problem.coordinates[row] for row in rows],
            map_images=self.problem.images,
            through="pyramid",
            mask=None,
        )
        p = dataclasses.replace(
            p,
            positions=[loops.cell_center(p, row[-1], row[1:-1])[:-1] for row in p.coordinates],
            query_levels=[row[-1] for row in p.coordinates],
            offsets=[sum(row[0] < image for row in p.coordinates) for image in range(p.images + 1)],
        )
        values = self.draw(len(rows), p.embed_dim)
        cells = {"background": self.draw(p.images + 1, len(p.shapes), p.embed_dim)}
        positions = torch.tensor(p.positions, dtype=torch.float64).view(-1, p.dim)
        tensors = cells | {"query": values[rows], "positions": positions, "values": values[rows]}
        pyramid = self.pyramid(values.to(self.dtype))
        background = cells["background"].to(self.dtype) if p.background else None
        encoded = block.encode(pyramid, background_embedding=background).values
        self.compare("encode", encoded[rows], loops.block(p, tensors, parameters))

    def image_of_point(self, row: int) -> int:
        return self.problem.coordinates[row][0]

    def block_arguments(self, block: Any, tensors: Tensors) -> dict[str, Any]:
        p = self.problem
        mask = p.mask
        pyramid = self.pyramid(tensors["values"])
        placement = tensors["positions"], torch.tensor(p.offsets)
        arguments = {
            "query": tensors["query"],
            "query_spatial_positions": placement[0],
            "query_batch_offsets": placement[1],
            "stacked_feature_maps": pyramid,
            "background_embedding": tensors.get("background"),
            "query_level_indices": self.query_levels(),
            "query_mask": None if mask is None else torch.tensor(mask, dtype=torch.bool),
        }
        if p.through == "plan":
            arguments["plan"] = block.make_plan(*placement, pyramid, self.query_levels())
        elif p.through == "coo":
            arguments["stacked_feature_maps"] = maps.coo_map(p, tensors["values"])
            arguments["level_spatial_shapes"] = torch.tensor(p.shapes)
            arguments["periodic_axes"] = p.periodic_axes
        return arguments


def sum_products(
    results: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Mapping[str, Tensor]
) -> Tensor:
    """A number with these gradients of the results; infinite ones get none."""
    total = sum_zeros(inputs)  # results without queries or points depend on nothing
    for x, y in zip(results, cotangents, strict=True):
        total = total + torch.where(x.isfinite(), x, 0).mul(y.to(x.dtype)).sum()
    return total


def sum_zeros(inputs: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([0 * x.sum() for x in inputs.values()]).sum()


def run_problem(seed: int, backend: BackendName, *, gradients: bool) -> float:
    """The largest difference in the problem of a seed; raises MismatchError if it is too large."""
    problem = draw_problem(seed, TOLERANCES[backend][0])
    return Checker(problem, backend, gradients=gradients).run()
