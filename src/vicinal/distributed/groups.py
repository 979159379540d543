"""Process groups, and agreement of their ranks: an error on one rank is raised on all."""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .._utils.checks import describe, refuse
from ..pyramid import FeaturePyramid

Group = ProcessGroup | DeviceMesh | None
"""The ranks that share a scene: a process group, a device mesh of one dimension such as
``mesh["space"]``, or None, all ranks."""

T = TypeVar("T")


class GroupHandle:
    """Holds a process group. Copies of it, also deep ones, hold the same group.

    Attributes:
        group: the ranks.
        drops: whether something drops rows by their numbers, so that plans have to number them.
        interior_first: whether queries that see no halo attend before it has come.
    """

    def __init__(
        self, group: ProcessGroup, drops: bool = False, interior_first: bool = False
    ) -> None:
        self.group, self.drops, self.interior_first = group, drops, interior_first

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupHandle":
        return self


class SharesGroup:
    """A dataclass with a field ``group``, which its copies share. It cannot be pickled."""

    group: ProcessGroup

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.group)] = self.group
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return type(self)(
            **{entry.name: copy.deepcopy(getattr(self, entry.name), memo) for entry in fields}
        )


def as_group(group: Any) -> ProcessGroup:
    """The process group of what a user gave.

    Raises:
        ValueError: it is no group, a mesh of several dimensions, or a group without this rank.
    """
    expected = "a process group, a device mesh of one dimension, or None"
    if not dist.is_available() or not dist.is_initialized():
        refuse("group", f"{expected}, after torch.distributed.init_process_group", describe(group))
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            came = f"a mesh of {group.ndim} dimensions, {group.mesh_dim_names}"
            refuse("group", f"{expected}, such as mesh['space']", came)
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, ProcessGroup) or dist.get_rank(group) < 0:
        refuse("group", f"{expected}, with this rank in it", describe(group))
    return group


def ranks_of(group: ProcessGroup) -> tuple[int, int]:
    """This rank in the group, and the number of ranks."""
    return dist.get_rank(group), dist.get_world_size(group)


def agree(group: ProcessGroup, call: str, find: Callable[[], tuple[T, dict[str, Any]]]) -> T:
    """Runs ``find`` on every rank and returns its result, if all ranks succeeded and agree.

    Args:
        group: whose ranks all call this.
        call: what they are doing.
        find: returns a result, and facts by name that must be the same on all ranks.

    Raises:
        ValueError: ``find`` raised one on some rank, whose message all ranks raise, or the ranks
            are not in the same call with the same facts.
        RuntimeError: ``find`` raised another error on some rank, or a rank stopped or did not call
            this within the timeout of the group.
    """
    error: Exception | None = None
    facts: dict[str, str] = {}
    try:
        result, found = find()
        facts = {name: str(value) for name, value in found.items()}
    except Exception as raised:
        error = raised
    own = None if error is None else (isinstance(error, ValueError), str(error)), call, facts
    reports: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(reports, own, group=group)
    except RuntimeError as lost:
        raise RuntimeError(
            f"{call}: a rank of {dist.get_process_group_ranks(group)} stopped, or did not call it "
            f"within the timeout of the group: {lost}"
        ) from (error or lost)
    for rank, (failure, _, _) in enumerate(reports):
        if failure is not None:
            kind = ValueError if failure[0] else RuntimeError
            raise kind(f"{failure[1]} (on rank {rank} of {len(reports)})") from error
    _check_equal("call", [call for _, call, _ in reports])
    for name in facts:
        _check_equal(name, [facts[name] for _, _, facts in reports])
    return result


def map_facts(pyramid: FeaturePyramid) -> dict[str, Any]:
    """What must be the same on all ranks of pyramids on one map."""
    names = "level_shapes", "batch_size", "periodic_axes", "strides"
    return {name: getattr(pyramid, name) for name in names}


def exchange_facts(name: str, x: Tensor) -> dict[str, Any]:
    """What must be the same on all ranks of tensors of which they exchange rows, see `agree`.

    A rank whose rows need no gradient would leave the others waiting in the backward pass.
    """
    return {
        f"{name} rows": (tuple(x.shape[1:]), x.dtype),
        f"{name} device": x.device.type,
        f"{name} requires_grad": x.requires_grad and torch.is_grad_enabled(),
    }


def _check_equal(name: str, came: Sequence[str]) -> None:
    """Raises ValueError unless what ``came`` from the ranks is equal."""
    for rank, text in enumerate(came):
        if text != came[0]:
            refuse(name, "the same on all ranks", f"{came[0]} on rank 0, {text} on rank {rank}")


def exchange_counts(counts: Sequence[int], group: ProcessGroup, device: torch.device) -> list[int]:
    """How many rows each rank sends to this one, where this one sends ``counts``."""
    sent = torch.tensor(counts, device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    numbers: list[int] = received.tolist()
    return numbers
