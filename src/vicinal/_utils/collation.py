"""Collation: the samples of a batch as one, through the containers that hold them."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any, TypeVar

import torch

from .checks import describe, refuse

T = TypeVar("T", bound=type)

_BATCHED_BY_CAT: list[type] = []
_OF_A_BATCH: list[type] = []


def batched_by_cat(kind: T) -> T:
    """Registers a class, as a decorator: `collate_pyramids` makes batches by its ``cat``.

    ``cat`` is a class method. It takes a list of instances, and returns one with the images of all.
    """
    _BATCHED_BY_CAT.append(kind)
    return kind


def of_a_batch(kind: T) -> T:
    """Registers a class, as a decorator, whose instances `collate_pyramids` does not join: they are
    made of a batch.
    """
    _OF_A_BATCH.append(kind)
    return kind


def _is_of_a_batch(value: Any) -> bool:
    return isinstance(value, tuple(_OF_A_BATCH))


def cat_of(value: Any) -> Callable[[Sequence[Any]], Any] | None:
    """The ``cat`` of a registered class that ``value`` is an instance of, else None."""
    for kind in _BATCHED_BY_CAT:
        if isinstance(value, kind):
            cat: Callable[[Sequence[Any]], Any] = type(value).cat  # type: ignore[attr-defined]
            return cat
    return None


def collate(samples: list[Any], field: str = "") -> Any:
    """One batch of ``samples``; ``field`` is where the data set's samples hold them."""
    first = samples[0]
    cat = cat_of(first)
    if cat is not None:
        try:
            return cat(samples)
        except ValueError as error:
            where = f"field {field} of the samples: " if field else ""
            raise ValueError(f"{where}{error}") from error
    for index, sample in enumerate(samples):
        if _is_of_a_batch(sample):
            expected = "parts that can be joined; make plans from the batch"
            refuse(f"samples[{index}]{field}", expected, f"a {type(sample).__name__}")
        if (sample is None) != (first is None):
            expected = "None, as in the first sample" if first is None else "a value, not None"
            refuse(f"samples[{index}]{field}", expected, sample)
    if first is None:
        return None
    if not _holds_ours(first):
        return _collate_others(samples, field)
    _check_structure(samples, field)
    parts = list(map(_parts, samples))
    joined = {
        key: collate([part[key] for part in parts], _name(first, field, key)) for key in parts[0]
    }
    return _rebuild(first, joined)


def _name(container: Any, field: str, key: Any) -> str:
    """The name of a part of ``container``, which is at ``field``, in messages."""
    by_index = isinstance(container, Mapping) or not _has_names(container)
    return f"{field}[{key!r}]" if by_index else f"{field}.{key}"


def _has_names(value: Any) -> bool:
    """Whether ``value`` is an instance of a dataclass or of a named tuple."""
    is_record = dataclasses.is_dataclass(value) or hasattr(value, "_fields")
    return is_record and not isinstance(value, type)


def _holds_ours(value: Any) -> bool:
    """Whether ``value`` is, or holds at any depth, None or an instance of a registered class."""
    if value is None or _is_of_a_batch(value) or cat_of(value) is not None:
        return True
    return any(map(_holds_ours, _parts(value).values()))


def batched_parts(value: Any, field: str = "") -> Iterator[tuple[str, Any]]:
    """What ``value``, which is at ``field``, holds that is batched by its ``cat``, and where."""
    if cat_of(value) is not None:
        yield field, value
        return
    for key, part in _parts(value).items():
        yield from batched_parts(part, _name(value, field, key))


def _parts(value: Any) -> dict[Any, Any]:
    """What a container holds, by key, name or index; nothing for other values."""
    if isinstance(value, Mapping):
        return dict(value)
    if _has_names(value):
        fields = getattr(value, "_fields", None)
        names = [field.name for field in dataclasses.fields(value)] if fields is None else fields
        return {name: getattr(value, name) for name in names}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return dict(enumerate(value))
    return {}


def _check_structure(samples: list[Any], field: str) -> None:
    """Raises ValueError unless all ``samples`` are containers with the parts of the first."""
    first = samples[0]
    kinds = Mapping, Sequence, type(first)
    kind = next(kind for kind in kinds if isinstance(first, kind))
    for index, sample in enumerate(samples):
        if not isinstance(sample, kind) or _parts(sample).keys() != _parts(first).keys():
            names = describe(list(_parts(first)))
            expected = f"a {type(first).__name__} with the same parts as the first, {names}"
            refuse(f"samples[{index}]{field}", expected, sample)


def _collate_others(samples: list[Any], field: str) -> Any:
    try:
        return torch.utils.data.default_collate(samples)
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        index = next((i for i, sample in enumerate(samples) if not _fit(samples[0], sample)), 0)
        expected = "what default_collate makes one batch of with the first sample's"
        came = f"{describe(samples[index])}: {error}"
        message = f"samples[{index}]{field}: expected {expected}, got {came}"
        raise ValueError(message) from error


def _fit(first: Any, other: Any) -> bool:
    try:
        torch.utils.data.default_collate([first, other])
    except (RuntimeError, TypeError, ValueError, LookupError):
        return False
    return True


def _rebuild(container: Any, parts: dict[Any, Any]) -> Any:
    """A container like ``container``, which keeps what else it has, with other ``parts``."""
    values = list(parts.values())
    if isinstance(container, MutableMapping | MutableSequence):
        clone = copy.copy(container)
        for key, value in parts.items():
            clone[key] = value
        return clone
    if isinstance(container, Mapping):
        return type(container)(parts)  # type: ignore[call-arg]
    if hasattr(container, "_fields"):
        return type(container)(*values)
    if not _has_names(container):
        return type(container)(values)
    record = copy.copy(container)
    for name, value in parts.items():
        object.__setattr__(record, name, value)  # frozen ones as well
    return record
