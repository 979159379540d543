"""Distributed training with torchrun, or a single process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """Initializes the process group under torchrun; yields the device of this process.

    The back end is nccl on GPUs, one per process, and gloo on CPUs.
    """
    n_processes, local_rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("LOCAL_RANK", 0)
    device = torch.device("cuda", int(local_rank)) if torch.cuda.is_available() else None
    if device is not None:
        torch.cuda.set_device(device)
    if n_processes > 1:
        dist.init_process_group("gloo" if device is None else "nccl")
    try:
        yield device or torch.device("cpu")
    finally:
        if n_processes > 1:
            dist.destroy_process_group()


PEER_STOPPED = "another process stopped; it prints the reason"


class PeerError(Exception):
    """Another process of the process group has stopped."""


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Raises a `PeerError` where a collective operation fails since another process stopped."""
    try:
        yield
    except RuntimeError as problem:
        # gloo raises a plain RuntimeError.
        if isinstance(problem, dist.DistError) or "gloo/transport" in str(problem):
            raise PeerError(PEER_STOPPED) from problem
        raise


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "WORLD_SIZE" in os.environ


def start_processes(n_processes: int, module: str, options: Sequence[str]) -> int:
    """Runs ``python -m module`` in several processes, as torchrun does; returns the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(["--standalone", "--nproc-per-node", str(n_processes), "-m", module, *options])
    except ChildFailedError as problem:
        return int(problem.get_first_failure()[1].exitcode)
    except SignalException as stop:  # the processes got it too, and say how to resume
        return 128 + int(stop.sigval)
    return 0


def rank_and_world_size() -> tuple[int, int]:
    """The rank of this process and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce_sums(values: Sequence[Tensor | float], device: torch.device) -> list[float]:
    """Sums each of ``values`` over the processes, in a single all-reduce."""
    packed = torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in values]
    )
    if rank_and_world_size()[1] > 1:
        dist.all_reduce(packed)
    summed: list[float] = packed.tolist()
    return summed


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Yields a list that collects SIGINT (Ctrl-C) and SIGTERM instead of raising at once.

    In a single process, a second signal acts at once, in case the process hangs. Under torchrun
    it does not: torchrun forwards signals that the terminal has sent to all processes already,
    and kills processes that do not stop in time.
    """
    received: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if rank_and_world_size()[1] == 1:
            restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()


def spawn_processes(n_processes: int, work: Callable[..., object], *arguments: object) -> None:
    """Calls ``work(device, *arguments)`` in new single-threaded processes of a process group."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(_work, (n_processes, port, work, arguments), nprocs=n_processes)


def _work(
    rank: int,
    n_processes: int,
    port: int,
    work: Callable[..., object],
    arguments: tuple[object, ...],
) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_processes, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ["MASTER_ADDR"] = "localhost"
    torch.set_num_threads(1)
    with process_group() as device:
        work(device, *arguments)


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: what torch allocated on a GPU, else that of the process.

    None on Windows, for a process: Python has no function for it there.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
