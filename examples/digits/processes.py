"""Several processes that train one model, as torchrun starts them, or a single one."""

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
def joined() -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did; gives the device of this one.

    They exchange gradients by nccl on GPUs, one each, and else by gloo.
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


class PeerError(Exception):
    """Another of the processes that train together is gone."""


@contextlib.contextmanager
def noticed_peers() -> Iterator[None]:
    """Turns what an exchange raises without its other side into a `PeerError`."""
    try:
        yield
    except RuntimeError as problem:
        # gloo has no class of its own for that.
        if isinstance(problem, dist.DistError) or "gloo/transport" in str(problem):
            raise PeerError("another process stopped, and says why") from problem
        raise


def rank_and_number() -> tuple[int, int]:
    """Which of the processes that train together this one is, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sums(values: Sequence[Tensor | float], device: torch.device) -> list[float]:
    """The sum over the processes of each of ``values``; one exchange for all of them."""
    packed = torch.stack(
        [torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in values]
    )
    if rank_and_number()[1] > 1:
        dist.all_reduce(packed)
    summed: list[float] = packed.tolist()
    return summed


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list that SIGINT (Ctrl-C) and SIGTERM are noted in, instead of acting at once.

    Of a single process, the second acts: it may hang. torchrun, though, passes on what the terminal
    has sent already, and ends by force those that do not stop in time.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if rank_and_number()[1] == 1:
            restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        restore()


def spawned(n_processes: int, work: Callable[..., object], *arguments: object) -> None:
    """Calls ``work(device, *arguments)`` in new processes that are `joined`, of one thread each."""
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
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_processes, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["MASTER_ADDR"] = "localhost"
    torch.set_num_threads(1)
    with joined() as device:
        work(device, *arguments)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: on a GPU what torch had there, else all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
