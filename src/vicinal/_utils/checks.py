"""Argument checks. Every error names the argument, what was expected and what came."""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

LevelShapes = tuple[tuple[int, ...], ...]


def describe(value: Any) -> str:
    """A short description of ``value`` for an error message."""
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r}"
    layout = "" if value.layout == torch.strided else f"{value.layout} "
    return f"{layout}{value.dtype} tensor of shape {list(value.shape)} on {value.device}"


def refuse(argument: str, expected: str, got: Any) -> NoReturn:
    """Raises the ValueError of a wrong argument; ``got`` is its value or a description of it."""
    came = got if isinstance(got, str) else describe(got)
    raise ValueError(f"{argument}: expected {expected}, got {came}")


def check_tensor(
    argument: str,
    value: Any,
    shape: Sequence[int | str],
    *,
    kind: str = "any",
    device: torch.device | None = None,
) -> None:
    """Raises ValueError unless ``value`` is a dense tensor of ``shape``, kind and device.

    A string in ``shape`` names a size that is free.
    """
    kinds = {
        "any": lambda dtype: True,
        "floating": lambda dtype: dtype.is_floating_point,
        "integer": _is_integer,
        "bool": lambda dtype: dtype == torch.bool,
    }
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        refuse(argument, _tensor_of(kind, shape), value)
    matches = value.dim() == len(shape) and all(
        isinstance(want, str) or want == size for want, size in zip(shape, value.shape, strict=True)
    )
    if not matches or not kinds[kind](value.dtype):
        refuse(argument, _tensor_of(kind, shape), value)
    if device is not None and value.device != device:
        refuse(argument, f"{_tensor_of(kind, shape)} on {device}", value)


def _tensor_of(kind: str, shape: Sequence[int | str]) -> str:
    noun = {"any": "a ", "integer": "an integer "}.get(kind, f"a {kind} ")
    return f"{noun}tensor of shape [{', '.join(map(str, shape))}]"


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def as_level_shapes(
    level_spatial_shapes: Tensor | Sequence[Sequence[int]], argument: str = "level_spatial_shapes"
) -> LevelShapes:
    """``[L, P]`` sizes as tuples of ints. It reads contents, so a GPU tensor synchronizes."""
    if isinstance(level_spatial_shapes, Tensor):
        check_tensor(argument, level_spatial_shapes, ("L", "P"), kind="integer")
        rows = level_spatial_shapes.tolist()
    else:
        rows = list(level_spatial_shapes)
        if not all(isinstance(row, Sequence) for row in rows):
            refuse(argument, "[L, P] sizes, a row per level", str(rows))
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        refuse(argument, "[L, P] sizes with L and P at least 1", level_spatial_shapes)
    shapes = tuple(tuple(as_integer(size) for size in row) for row in rows)
    if any(size is None or size < 1 for row in shapes for size in row):
        refuse(argument, "positive integers", str(rows))
    return cast(LevelShapes, shapes)


def as_integer(value: Any) -> int | None:
    """``value`` as an int if it is an integer, NumPy integers included; None otherwise."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_neighborhood_sizes(neighborhood_sizes: Sequence[int], n_levels: int) -> tuple[int, ...]:
    expected = f"one window width per level ({n_levels})"
    if not isinstance(neighborhood_sizes, Sequence):
        refuse("neighborhood_sizes", expected, neighborhood_sizes)
    if len(neighborhood_sizes) != n_levels:
        refuse("neighborhood_sizes", expected, str(list(neighborhood_sizes)))
    sizes = tuple(as_integer(size) for size in neighborhood_sizes)
    if any(size is None or size < 1 or size % 2 == 0 for size in sizes):
        came = str(list(neighborhood_sizes))
        refuse("neighborhood_sizes", "odd neighborhood_sizes, at least 1", came)
    return cast(tuple[int, ...], sizes)


def check_counts(**counts: int) -> None:
    """Raises ValueError unless all ``counts`` are integers of at least one."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            refuse(name, "an integer of at least 1", count)


def check_cells(argument: str, size: float) -> None:
    """Raises ValueError unless ``size`` is a positive, finite length in cells."""
    if not isinstance(size, int | float) or not 0 < size < math.inf:
        refuse(argument, "a finite size above 0, in cells", size)


def check_dropout(argument: str, rate: float) -> None:
    if not isinstance(rate, int | float) or not 0.0 <= rate < 1.0:
        refuse(argument, "a rate in [0, 1)", rate)


def reads_contents(check_contents: bool | None, device: torch.device) -> bool:
    """Whether to run the checks that read tensor contents. For None, the default: on the CPU only,
    since they synchronize a GPU, and not in a compiled graph, where contents do not exist yet.
    """
    if check_contents is None:
        return device.type == "cpu" and not torch.compiler.is_compiling()
    return check_contents


def check_finite(argument: str, value: Tensor) -> None:
    finite = torch.isfinite(value).flatten(1).all(1)
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        refuse(argument, "finite numbers", f"{value[row].tolist()} in row {row}")


def check_offsets(argument: str, offsets: Tensor, total: int) -> None:
    values = offsets.tolist()
    rising = all(a <= b for a, b in itertools.pairwise(values))
    if values[0] != 0 or values[-1] != total or not rising:
        refuse(argument, f"offsets that rise from 0 to {total}", str(values))


def check_rows(argument: str, rows: Tensor | None, n: int, device: torch.device) -> Tensor:
    """``rows`` as int64, all of the ``n`` rows for None; raises ValueError for other indices."""
    if rows is None:
        return torch.arange(n, device=device)
    check_tensor(argument, rows, ("n",), kind="integer", device=device)
    if reads_contents(None, device):
        check_range(argument, rows, n)
    return rows.long()


def check_range(argument: str, indices: Tensor, stop: int) -> None:
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= stop):
        span = f"indices from {int(indices.min())} to {int(indices.max())}"
        refuse(argument, f"indices in [0, {stop})", span)
