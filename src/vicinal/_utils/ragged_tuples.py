"""The named tuples of ragged batches: several as one."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import as_tensor, check_offsets, check_tensor, describe, reads_contents, refuse
from .ragged import offsets_from_counts

Ragged = TypeVar("Ragged", bound=tuple[Any, ...])


def cat_ragged(kind: type[Ragged], parts: Sequence[Ragged]) -> Ragged:
    """Makes one named tuple of the images of several, one after another.

    Args:
        kind: a named tuple with the field ``offsets`` ``[B + 1]``; each other field has the rows of
            all images, or is None.
        parts: at least one.

    Raises:
        ValueError: there is no part, one is of another class, a field has another width, dtype or
            device than in the first part or is None in some parts alone, or the offsets of a part
            do not rise from 0 to its number of rows.
    """
    name = kind.__name__
    if not isinstance(parts, Sequence) or not parts:
        refuse("parts", f"at least one {name}", parts)
    columns: dict[str, list[Tensor | None]] = {field: [] for field in _fields(kind)}
    for index, part in enumerate(parts):
        if not isinstance(part, kind):
            refuse(f"parts[{index}]", f"a {name}", part)
        for field, value in _as_tensors(f"parts[{index}]", part).items():
            _check_alike(f"parts[{index}].{field}", columns[field], value)
            columns[field].append(value)
    return kind(**{field: _cat(field, values) for field, values in columns.items()})


def _fields(kind: Any) -> tuple[str, ...]:
    return tuple(kind._fields)


def _as_tensors(argument: str, part: Any) -> dict[str, Tensor | None]:
    """The fields of one part as tensors, integers as int64; raises ValueError for fields that do
    not belong together.
    """
    rows: int | str = "n"
    device = None
    tensors: dict[str, Tensor | None] = {}
    for field in _fields(part):
        name, value = f"{argument}.{field}", as_tensor(f"{argument}.{field}", getattr(part, field))
        is_optional = field in part._field_defaults
        if field != "offsets" and not (value is None and is_optional):
            is_matrix = isinstance(value, Tensor) and value.dim() == 2
            shape = (rows, "width") if is_matrix else (rows,)
            value = check_tensor(name, value, shape, kind="number", device=device)
            rows, device = value.shape[0], value.device
            value = value if value.is_floating_point() else value.long()
        tensors[field] = value
    name = f"{argument}.offsets"
    offsets = check_tensor(name, part.offsets, ("B + 1",), kind="integer", device=device)
    if not offsets.shape[0]:
        refuse(name, "at least one number", offsets)
    if reads_contents(None, offsets.device):
        check_offsets(name, offsets, int(rows))
    tensors["offsets"] = offsets.long()
    return tensors


def _check_alike(argument: str, earlier: Sequence[Tensor | None], value: Tensor | None) -> None:
    """Raises ValueError unless ``value`` can be concatenated with those of ``earlier`` parts."""
    if not earlier:
        return
    first = earlier[0]
    if first is None or value is None:
        if first is not value:
            expected = "None" if first is None else "a tensor"
            refuse(argument, f"{expected}, as in the first part", value)
        return
    facts = [(tensor.shape[1:], tensor.dtype, tensor.device) for tensor in (first, value)]
    if facts[0] != facts[1]:
        expected = f"width, dtype and device as in the first part, {describe(first)}"
        refuse(argument, expected, value)


def _cat(field: str, values: list[Any]) -> Tensor | None:
    """The rows of all parts, or offsets that go on from part to part; None for None."""
    if values[0] is None:
        return None
    if field != "offsets":
        return torch.cat(values)
    # By differences: those are what parts have in common, and no number of rows is read.
    counts = torch.cat([offsets.diff() for offsets in values])
    return offsets_from_counts(counts)
