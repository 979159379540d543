"""What ranks send to one another, and how long they wait for it."""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

COLLECTIVES = ("all_gather", "all_gather_object", "all_reduce", "all_to_all_single", "broadcast")


class Meter:
    """Sums over all collective operations of this rank while `metered` is active."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0  # in the operations; waiting for slower ranks included
        self.row_bytes = 0  # floating-point rows sent to other ranks
        self.plan_bytes = 0  # integers sent to other ranks by exchanges, as planning does
        self._device = device

    def watch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, timed and counted."""
        signature = inspect.signature(call)

        def watched(*arguments: Any, **options: Any) -> Any:
            given = signature.bind(*arguments, **options).arguments
            if "input_split_sizes" in signature.parameters:
                self._count(given["input"], given.get("input_split_sizes"), given.get("group"))
            with self.timed():
                work = call(*arguments, **options)
            return None if work is None else _WatchedWork(work, self)

        return watched

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time inside. On a GPU the work before is done first, that inside at the end."""
        synchronize(self._device)
        start = time.perf_counter()
        yield
        synchronize(self._device)
        self.seconds += time.perf_counter() - start

    def _count(self, rows: Tensor, splits: list[int] | None, group: Any) -> None:
        n_rows, n_ranks = len(rows), dist.get_world_size(group)
        own = splits[dist.get_rank(group)] if splits else n_rows // n_ranks
        sent = (n_rows - own) * rows[:1].numel() * rows.element_size()
        if rows.is_floating_point():
            self.row_bytes += sent
        else:
            self.plan_bytes += sent


class _WatchedWork:
    """An operation that was started, whose time to wait for counts."""

    def __init__(self, work: Any, meter: Meter) -> None:
        self._work, self._meter = work, meter

    def wait(self, *arguments: Any) -> Any:
        with self._meter.timed():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextlib.contextmanager
def metered(device: torch.device) -> Iterator[Meter]:
    """Watches the collective operations that are called through ``torch.distributed``."""
    meter = Meter(device)
    with contextlib.ExitStack() as patches:
        for name in COLLECTIVES:
            watched = meter.watch(getattr(dist, name))
            patches.enter_context(mock.patch.object(dist, name, watched))
        yield meter


def synchronize(device: torch.device) -> None:
    """Waits for the device of a rank."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
