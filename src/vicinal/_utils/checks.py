"""Argument checks. Every error names the argument, what was expected and what came."""

import itertools
import math
import numbers
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

LevelShapes = tuple[tuple[int, ...], ...]


_LONGEST = 200  # characters of a value in an error message


def describe(value: Any) -> str:
    """A short description of ``value`` for an error message: never the numbers of a tensor."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f"{value.layout} "
        return f"{layout}{value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    if _is_array(value) and value.shape != ():
        return f"{value.dtype} array of shape {list(value.shape)}"
    if isinstance(value, list | tuple) and any(map(_is_tensor_or_array, value)):
        items = ", ".join(map(describe, value[:4])) + (", ..." if len(value) > 4 else "")
        return f"{type(value).__name__} of {items}"
    if isinstance(value, Mapping) and any(map(_is_tensor_or_array, value.values())):
        return f"{type(value).__name__} with the keys {describe(list(value))}"
    name = type(value).__name__
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return f"{name} with too many digits to print"
    shortened = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    # The text of many types begins with their names, as in torch.Size([3]).
    names_type = "(" in text and text.partition("(")[0].rpartition(".")[2] == name
    return shortened if names_type else f"{name} {shortened}"


def _is_array(value: Any) -> bool:
    """Whether ``value`` is an array of NumPy or of a library with the same protocol."""
    return hasattr(value, "__array__") and hasattr(value, "dtype") and hasattr(value, "shape")


def _is_tensor_or_array(value: Any) -> bool:
    return isinstance(value, Tensor) or _is_array(value)


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
) -> Tensor:
    """Returns ``value`` as a tensor; raises ValueError unless it has ``shape``, kind and device.

    A NumPy array becomes a tensor on ``device``. A string in ``shape`` names a size that is free.
    """
    value = as_tensor(argument, value, device)
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        refuse(argument, _tensor_of(kind, shape), value)
    matches = value.dim() == len(shape) and all(
        isinstance(want, str) or want == size for want, size in zip(shape, value.shape, strict=True)
    )
    if not matches or not _KINDS[kind](value.dtype):
        refuse(argument, _tensor_of(kind, shape), value)
    if device is not None and value.device != device:
        refuse(argument, f"{_tensor_of(kind, shape)} on {device}", value)
    return as_signed(argument, value)


def as_tensor(argument: str, value: Any, device: torch.device | None = None) -> Any:
    """A NumPy array as a tensor on ``device``, the CPU for None; all else as it is.

    Raises:
        ValueError: the array has a dtype that tensors do not have, or masked entries.
    """
    if isinstance(value, Tensor) or not _is_array(value):
        return value
    numpy = sys.modules.get("numpy")
    if numpy is not None and numpy.ma.is_masked(value):
        refuse(argument, "an array without masked entries", value)
    try:
        return torch.as_tensor(_native(value), device=device)
    except (TypeError, ValueError):
        refuse(argument, "an array of numbers that tensors can hold", value)


def _native(array: Any) -> Any:
    """An array that a tensor can share memory with; a copy where strides, byte order or a flag
    that forbids writing are in the way.
    """
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(array, numpy.ndarray):
        return array
    native = numpy.require(array, array.dtype.newbyteorder("="), ["C", "W"])
    # To NumPy, the stride of an axis of one entry may be any.
    odd = any(stride % (native.itemsize or 1) for stride in native.strides)
    return native.copy() if odd else native


def as_signed(argument: str, value: Tensor) -> Tensor:
    """``value`` as int64 if its dtype is an unsigned one for which torch has few functions."""
    if value.dtype not in (torch.uint16, torch.uint32, torch.uint64):
        return value
    signed = value.long()
    if value.dtype == torch.uint64 and reads_contents(None, value.device):
        entries = signed._values() if signed.is_sparse else signed
        if (entries < 0).any():
            refuse(argument, "integers below 2^63", value)
    return signed


def _tensor_of(kind: str, shape: Sequence[int | str]) -> str:
    noun = {"any": "a ", "integer": "an integer "}.get(kind, f"a {kind} ")
    return f"{noun}tensor of shape [{', '.join(map(str, shape))}]"


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


_KINDS: dict[str, Callable[[torch.dtype], bool]] = {
    "any": lambda dtype: True,
    "floating": lambda dtype: dtype.is_floating_point,
    "integer": _is_integer,
    "number": lambda dtype: dtype.is_floating_point or _is_integer(dtype),
    "bool": lambda dtype: dtype == torch.bool,
}


def as_level_shapes(
    level_spatial_shapes: Any, argument: str = "level_spatial_shapes"
) -> LevelShapes:
    """``[L, P]`` sizes as tuples of ints. It reads contents, so a GPU tensor synchronizes."""
    expected = "[L, P] positive sizes, a row per level, with L and P at least 1"
    rows = as_list(argument, level_spatial_shapes, expected)
    if not isinstance(rows, list | tuple) or not rows:
        refuse(argument, expected, level_spatial_shapes)
    shapes = [as_integers(as_list(argument, row, expected)) for row in rows]
    if None in shapes:
        refuse(argument, expected, level_spatial_shapes)
    if any(not row or len(row) != len(rows[0]) or min(row) < 1 for row in shapes):
        refuse(argument, expected, rows)
    return cast(LevelShapes, tuple(shapes))


def as_spatial_shape(spatial_shape: Any, position_dim: int | None = None) -> tuple[int, ...]:
    """``[P]`` sizes as a tuple of ints. It reads contents, so a GPU tensor synchronizes."""
    expected = f"{'P' if position_dim is None else position_dim} positive sizes"
    shape = as_integers(as_list("spatial_shape", spatial_shape, expected))
    if not shape or min(shape) < 1 or position_dim not in (None, len(shape)):
        refuse("spatial_shape", expected, shape or spatial_shape)
    return shape


def as_list(argument: str, value: Any, expected: str) -> Any:
    """A tensor or an array as nested lists; all else as it is."""
    value = as_tensor(argument, value)
    if not isinstance(value, Tensor):
        return value
    if value.layout != torch.strided or value.device.type == "meta":
        refuse(argument, expected, value)
    return value.tolist()


def as_integer(value: Any) -> int | None:
    """``value`` as an int if it is an integer, NumPy integers included; None otherwise."""
    if isinstance(value, bool):
        return None
    # Asked for first, since compilers before torch 2.11 do not take the TypeError of its call, and
    # not of an int, since there sizes that vary have no attributes.
    if not isinstance(value, int) and not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_integers(values: Any) -> tuple[int, ...] | None:
    """``values`` as a tuple of ints if it is a sequence of integers; None otherwise."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return None
    integers = tuple(map(as_integer, values))
    return None if None in integers else cast(tuple[int, ...], integers)


def as_numbers(
    argument: str, values: Any, n: int, expected: str | None = None
) -> tuple[float, ...]:
    """``n`` finite numbers, of one number or of a sequence, tensor or array ``[n]``.

    They are floats or ints, see `as_float`. ``expected`` is for the message; None: a number for
    each of ``n`` axes.
    """
    expected = expected or f"a finite number, or one for each of {n} axes"
    given = as_list(argument, values, expected)
    given = [given] * n if is_real(given) else given
    if not isinstance(given, Sequence) or len(given) != n or not all(map(is_real, given)):
        refuse(argument, expected, values)
    if not all(map(math.isfinite, given)):
        refuse(argument, expected, values)
    return tuple(map(as_float, given))


def as_float(number: Any) -> float:
    """A finite real number as a float, or as an int where it is an integer that no float equals."""
    nearest = float(number)
    integer = as_integer(number)
    return nearest if integer is None or integer == nearest else integer


def check_counts(**counts: int) -> None:
    """Raises ValueError unless all ``counts`` are integers of at least one."""
    for name, count in counts.items():
        if (as_integer(count) or 0) < 1:
            refuse(name, "an integer of at least 1", count)


def check_cells(argument: str, size: float) -> None:
    """Raises ValueError unless ``size`` is a positive, finite length in cells."""
    if not is_real(size) or not 0 < size < math.inf:
        refuse(argument, "a finite size above 0, in cells", size)


def check_base(argument: str, theta: Any) -> float:
    """``theta`` as a float; raises ValueError unless it is a finite base of frequencies."""
    if not is_real(theta) or not 0 < theta < math.inf:
        refuse(argument, "a finite number above 0", theta)
    return float(theta)


def check_dropout(argument: str, rate: float) -> None:
    if not is_real(rate) or not 0.0 <= rate < 1.0:
        refuse(argument, "a rate in [0, 1)", rate)


def check_rate(argument: str, rate: float) -> None:
    """Raises ValueError unless ``rate`` is a probability."""
    if not is_real(rate) or not 0.0 <= rate <= 1.0:
        refuse(argument, "a rate in [0, 1]", rate)


def check_type(argument: str, value: Any, kind: type) -> None:
    """Raises ValueError unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        refuse(argument, f"a {kind.__name__}", value)


def is_real(value: Any) -> bool:
    """Whether ``value`` is a real number within the range of floats, NumPy numbers included."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:  # a large integer
        return False
    return True


def reads_contents(check_contents: bool | None, device: torch.device) -> bool:
    """Whether to run the checks that read tensor contents. For None, the default: on the CPU only,
    since they synchronize a GPU, and not in a compiled graph, where contents do not exist yet.
    """
    if check_contents is None:
        if device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return type(torch.empty(0)) is Tensor  # fake tensors have no contents
    return check_contents


def has_contents(value: Tensor) -> bool:
    """Whether a tensor has contents: not one on the meta device, nor a fake one in eager mode."""
    if torch.compiler.is_compiling():
        return True
    return value.device.type != "meta" and type(torch.empty(0)) is Tensor


def check_finite(argument: str, value: Tensor) -> None:
    # One pass without a copy; a number that is not finite becomes the least or the largest.
    if not value.numel() or all(map(math.isfinite, map(float, value.detach().aminmax()))):
        return
    row = int(torch.isfinite(value).flatten(1).all(1).logical_not().nonzero()[0])
    refuse(argument, "finite numbers", f"{value[row].tolist()} in row {row}")


def check_offsets(argument: str, offsets: Tensor, total: int) -> None:
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != total:
        came = f"offsets from {values[0]} to {values[-1]}"
        refuse(argument, f"offsets that rise from 0 to {total}", came)
    for index, (first, second) in enumerate(itertools.pairwise(values)):
        if first > second:
            came = f"{second} after {first} at index {index + 1}"
            refuse(argument, f"offsets that rise from 0 to {total}", came)


def check_rows(argument: str, rows: Tensor | None, n: int, device: torch.device) -> Tensor:
    """``rows`` as int64, all of the ``n`` rows for None; raises ValueError for other indices."""
    if rows is None:
        return torch.arange(n, device=device)
    return check_ids(argument, rows, "n", n, device)


def check_ids(argument: str, rows: Tensor, n: int | str, stop: int, device: torch.device) -> Tensor:
    """``rows`` ``[n]`` as int64; raises ValueError for other than ``n`` indices below ``stop``."""
    rows = check_tensor(argument, rows, (n,), kind="integer", device=device)
    if reads_contents(None, device):
        check_range(argument, rows, stop)
    return rows.long()


def check_range(argument: str, indices: Tensor, stop: int) -> None:
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= stop):
        span = f"indices from {int(indices.min())} to {int(indices.max())}"
        refuse(argument, f"indices in [0, {stop})", span)
