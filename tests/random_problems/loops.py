"""The specification as plain loops over queries and cells.

It uses nothing of the library, no slices and no sorted orders. All tensors are float64, and
autograd gives the expected gradients.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .problem import Problem, Real
from .windows import Cell, window_steps


class Slot(NamedTuple):
    """One of the K cells of a query's windows."""

    level: int
    cell: Cell  # as computed, maybe beyond the map
    wrapped: Cell  # the same along periodic axes modulo the level's size
    points: list[int]  # stored there


# ---------------------------------------------------------------------------------- geometry


def full_shape(problem: Problem) -> list[int]:
    return [max(axis) for axis in zip(*problem.shapes, strict=True)]


def scale(problem: Problem, level: int, axis: int, real: Real) -> np.floating:
    """The scale of a level: a ratio of strides if they are known, else of sizes."""
    if problem.strides is not None:
        least = min(steps[axis] for steps in problem.strides)
        return real(least) / real(problem.strides[level][axis])
    return real(problem.shapes[level][axis]) / real(full_shape(problem)[axis])


def wrapped_position(problem: Problem, query: int) -> list[np.floating]:
    """The position of a query, modulo the full shape along periodic axes."""
    position = [problem.real(x) for x in problem.positions[query]]
    for axis in problem.periodic_axes:
        size = problem.real(full_shape(problem)[axis])
        rest = position[axis] % size
        position[axis] = rest if rest < size else problem.real(0)
    return position


def center(problem: Problem, position: Sequence[np.floating], level: int) -> Cell:
    cell = []
    for axis, size in enumerate(problem.shapes[level]):
        x = math.floor(position[axis] * scale(problem, level, axis, problem.real))
        cell.append(min(x, size - 1) if axis in problem.periodic_axes else x)
    return tuple(cell)


def window_cells(problem: Problem, query: int) -> Iterator[tuple[int, Cell]]:
    """Level and cell of all slots of a query."""
    position = wrapped_position(problem, query)
    for level, window in enumerate(problem.windows):
        start = list(center(problem, position, level))
        for axis in range(problem.dim):
            if window.causal[axis]:
                start[axis] = last_complete_cell(problem, query, level, axis)
        for step in window_steps(window):
            moves = zip(start, window.dilations, step, strict=True)
            yield level, tuple(c + dilation * o for c, dilation, o in moves)


def last_complete_cell(problem: Problem, query: int, level: int, axis: int) -> int:
    """The last cell of a level that is complete when the query's own cell ends."""
    sizes = [shape[axis] for shape in problem.shapes]
    own = sizes.index(max(sizes))
    if problem.query_levels is not None:
        own = problem.query_levels[query]
    position = problem.real(problem.positions[query][axis])
    y = math.floor(position * scale(problem, own, axis, problem.real))
    return math.floor(Fraction((y + 1) * sizes[level], sizes[own])) - 1


def wrap_cell(problem: Problem, level: int, cell: Cell) -> Cell:
    sizes = problem.shapes[level]
    return tuple(
        x % sizes[axis] if axis in problem.periodic_axes else x for axis, x in enumerate(cell)
    )


def is_outside(problem: Problem, level: int, cell: Cell) -> bool:
    return any(not 0 <= x < size for x, size in zip(cell, problem.shapes[level], strict=True))


def image_of(problem: Problem, query: int) -> int:
    for image, (start, stop) in enumerate(itertools.pairwise(problem.offsets)):
        if start <= query < stop:
            return image
    raise AssertionError(query)


def windows(problem: Problem) -> list[list[Slot]]:
    """The slots of every query, with the points of its own image."""
    stored: dict[Cell, list[int]] = defaultdict(list)
    for point, row in enumerate(problem.coordinates):
        stored[row].append(point)
    result = []
    for query in range(len(problem.positions)):
        image, slots = image_of(problem, query), []
        for level, cell in window_cells(problem, query):
            wrapped = wrap_cell(problem, level, cell)
            points = stored.get((image, *wrapped, level), [])
            slots.append(Slot(level, cell, wrapped, points))
        result.append(slots)
    return result


def cell_center(problem: Problem, level: int, cell: Cell) -> list[float]:
    """Its position in cells of the full shape, with the level as one more coordinate."""
    scales = (float(scale(problem, level, axis, np.float64)) for axis in range(problem.dim))
    return [*((x + 0.5) / s for x, s in zip(cell, scales, strict=True)), level]


def finest_level(problem: Problem) -> int:
    cells = [math.prod(shape) for shape in problem.shapes]
    return cells.index(max(cells))


# --------------------------------------------------------------------------------- attention


def attend(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attended values ``[H, dv]`` and log-sum-exp ``[H]`` of one query with logits ``[m, H]``."""
    return (logits.softmax(0)[..., None] * values).sum(0), logits.logsumexp(0)


def functional(
    problem: Problem,
    tensors: Mapping[str, Tensor],
    key_rows: Mapping[tuple[int, Cell], int],
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`neighborhood_attention`: output ``[N, H, dv]`` and log-sum-exp ``[N, H]``, and the weights
    ``[N, nnz + L, H]`` of all points, then of all empty cells of each level.

    ``key_rows`` has the row of the key of a point at a cell, copies included.
    """
    q, k, v = (tensors[name] for name in "qkv")
    outs, sums = [v.new_zeros(0, *v.shape[1:])], [q.new_zeros(0, q.shape[1])]
    weights = q.new_zeros(len(q), len(v) + len(problem.shapes), q.shape[1])
    for query, slots in enumerate(windows(problem)):
        rows = [key_rows[point, slot.cell] for slot in slots for point in slot.points]
        points = [point for slot in slots for point in slot.points]
        columns = list(points)
        where = [index for index, slot in enumerate(slots) for _ in slot.points]
        logits, values = (q[query] * k[rows]).sum(-1), v[points]
        empty = [index for index, slot in enumerate(slots) if not slot.points]
        if problem.background and empty:
            levels = [slots[index].level for index in empty]
            cells = tensors["cell_query"][query, levels] * tensors["cell_key"][empty]
            logits = torch.cat((logits, cells.sum(-1)))
            values = torch.cat((values, tensors["cell_value"][image_of(problem, query), levels]))
            where += empty
            columns += [len(v) + level for level in levels]
        logits = logits * factor
        if problem.bias:
            logits = logits + tensors["bias"][where]
        if is_masked(problem, query):
            logits, values, columns = logits[:0], values[:0], []
        out, total = attend(logits, values)
        index = torch.tensor(columns, dtype=torch.int64)
        weights[query].index_add_(0, index, logits.detach().softmax(0))
        outs.append(out[None])
        sums.append(total[None])
    return torch.cat(outs), torch.cat(sums), weights


def is_masked(problem: Problem, query: int) -> bool:
    return problem.mask is not None and problem.mask[query]


# ------------------------------------------------------------------------------------- block


def rotate(problem: Problem, parameters: Mapping[str, Tensor], x: Tensor, places: Tensor) -> Tensor:
    """``x`` ``[m, H, d]`` rotated at ``places`` ``[m, P + 1]``."""
    assert problem.block is not None
    if not problem.block["rotary"]:
        return x
    scales = problem.block["rope_axis_scales"] or [1.0] * problem.dim
    places = places * places.new_tensor([*scales, 1.0])
    space, level = list(range(problem.dim)), [problem.dim]
    groups = {
        "single": [space + level],
        "partition": [space, level],
        "closure": [space, level, space + level],
    }[problem.block["rope_freq_group_pattern"]]
    angles = []
    for group, coordinates in enumerate(groups):
        freqs = parameters[f"pos_encoding.freqs.{group}"]
        angle = places.new_zeros(len(places), problem.heads, freqs.shape[-1])
        for row, coordinate in enumerate(coordinates):
            angle = angle + places[:, coordinate, None, None] * freqs[row]
        angles.append(angle)
    t = torch.cat(angles, -1)
    a, b = x[..., 0::2], x[..., 1::2]
    turned = (a * t.cos() - b * t.sin(), a * t.sin() + b * t.cos())
    return torch.stack(turned, -1).flatten(-2)


def layer_norm(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * parameters["norm.weight"] + parameters["norm.bias"]


def linear(parameters: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ parameters[f"{name}.weight"].T
    return y + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else y


def block(
    problem: Problem, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> Tensor:
    """`SparseNeighborhoodAttentionBlock`: ``[N, E]``."""
    assert problem.block is not None
    query, positions = tensors["query"], tensors["positions"]
    for axis in problem.periodic_axes:
        wrapped = [float(wrapped_position(problem, i)[axis]) for i in range(len(query))]
        shift = torch.tensor(wrapped, dtype=query.dtype) - positions[:, axis].detach()
        positions = positions + shift[:, None] * torch.eye(problem.dim, dtype=query.dtype)[axis]
    default = [finest_level(problem)] * len(query)
    levels = default if problem.query_levels is None else problem.query_levels
    places = torch.cat((positions, query.new_tensor(levels)[:, None]), 1)
    first = problem.block["norm_first"]
    x = layer_norm(parameters, query) if first else query
    heads = (problem.heads, problem.head_dim)
    q = linear(parameters, "q_in_proj", x).unflatten(-1, heads)
    q = rotate(problem, parameters, q, places)
    attended = [query.new_zeros(0, problem.embed_dim)]
    for index, slots in enumerate(windows(problem)):
        embeddings, where, cells = gather(problem, tensors, image_of(problem, index), slots)
        if is_masked(problem, index):
            attended.append(query.new_zeros(1, problem.embed_dim))
            continue
        both = linear(parameters, "kv_proj", embeddings).unflatten(-1, (2, *heads))
        keys = rotate(problem, parameters, both[:, 0], where)
        logits = (q[index] * keys).sum(-1) / math.sqrt(problem.head_dim)
        if problem.block["relative_bias"]:
            logits = logits + parameters["relative_bias"][cells]
        values, turns_values = both[:, 1], problem.block["rotary_values"]
        out, _ = attend(
            logits, rotate(problem, parameters, values, where) if turns_values else values
        )
        out = rotate(problem, parameters, out[None], -places[index][None]) if turns_values else out
        attended.append(out.flatten()[None])
    out = query + linear(parameters, "out_proj", torch.cat(attended))
    return out if first else layer_norm(parameters, out)


def gather(
    problem: Problem, tensors: Mapping[str, Tensor], image: int, slots: Sequence[Slot]
) -> tuple[Tensor, Tensor, list[int]]:
    """Embeddings ``[m, E]``, places ``[m, P + 1]`` and slots ``[m]`` of all that a query attends
    to.
    """
    points, empty, where, where_empty = [], [], [], []
    cells, cells_empty = [], []
    for index, slot in enumerate(slots):
        if not slot.points and not problem.background:
            continue
        place = cell_center(problem, slot.level, slot.cell)
        points += slot.points
        where += [place] * len(slot.points)
        cells += [index] * len(slot.points)
        if not slot.points:
            empty.append(slot.level)
            where_empty.append(place)
            cells_empty.append(index)
    embeddings = tensors["values"][points]
    if empty:
        embeddings = torch.cat((embeddings, tensors["background"][image, empty]))
    places = embeddings.new_tensor(where + where_empty).view(-1, problem.dim + 1)
    return embeddings, places, cells + cells_empty
