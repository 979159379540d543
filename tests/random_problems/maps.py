"""A problem's points as sparse COO maps, and what such maps store."""

import dataclasses
import random
from collections.abc import Mapping

import torch
from torch import Tensor

from .problem import Problem
from .windows import Cell


def coo_map(problem: Problem, values: Tensor) -> Tensor:
    """``[B, *spatial, L, E]``, not coalesced. Without strides its size may differ from the full
    shape: it may be padded, or just hold the points.
    """
    size = [max(axis) for axis in zip(*problem.shapes, strict=True)]
    if problem.strides is None:
        rng = random.Random(problem.seed)
        for axis, most in enumerate(size):
            held = max((row[axis + 1] + 1 for row in problem.coordinates), default=1)
            size[axis] = rng.randint(held, most + 3)
    indices = torch.tensor(problem.coordinates, dtype=torch.int64).view(-1, problem.dim + 2)
    size = [problem.map_images, *size, len(problem.shapes), values.shape[1]]
    return torch.sparse_coo_tensor(indices.T, values, size, check_invariants=True)


def level_map(problem: Problem, values: Tensor, level: int) -> Tensor:
    """``[B, *S, E]`` of one level, not coalesced."""
    rows = [row for row, cell in enumerate(problem.coordinates) if cell[-1] == level]
    cells = [problem.coordinates[row][:-1] for row in rows]
    indices = torch.tensor(cells, dtype=torch.int64).view(-1, problem.dim + 1)
    size = (problem.map_images, *problem.shapes[level], values.shape[1])
    return torch.sparse_coo_tensor(indices.T, values[rows], size, check_invariants=True)


def stored(problem: Problem, tensors: Mapping[str, Tensor]) -> tuple[Problem, dict[str, Tensor]]:
    """The problem as the block is given it: a COO map sums the points of a cell."""
    if problem.through != "coo" or not problem.coordinates:
        return problem, dict(tensors)
    sums: dict[Cell, Tensor] = {}
    for row, value in zip(problem.coordinates, tensors["values"], strict=True):
        sums[row] = sums[row] + value if row in sums else value
    values = torch.stack(list(sums.values()))
    return dataclasses.replace(problem, coordinates=list(sums)), {**tensors, "values": values}
