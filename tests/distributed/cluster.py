"""Processes that run a function together, each as one rank of a group."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from compilers import floats_are_constants
from garbage import rarely
from started import light_context
from torch.distributed import ProcessGroup

LARGEST = 4  # ranks
TIMEOUT = timedelta(seconds=60)  # a hang becomes an error


class RanksFailedError(Exception):
    """What went wrong, by rank."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in errors.items()))
        self.errors = errors


class Cluster:
    """Processes that stay for many tests, since starting them takes seconds.

    They belong to groups of 1 to ``size`` ranks on gloo. A rank computes with one thread.
    """

    def __init__(self, size: int = LARGEST, timeout: timedelta = TIMEOUT) -> None:
        self.size, self.timeout = size, timeout
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = light_context()
        for rank in range(self.size):
            own, other = context.Pipe()
            arguments = rank, self.size, self.timeout, port, other
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self.pipes.append(own)
            self.processes.append(process)

    def run(self, n_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(group, *arguments)`` on every rank; its results, rank by rank.

        The function is one of a module, so that it can be sent by name.

        Raises:
            RanksFailedError: it raised an error on some rank.
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes[:n_ranks]:
            pipe.send((n_ranks, function, arguments))
        answers = [_receive(pipe) for pipe in self.pipes[:n_ranks]]
        errors = {rank: text for rank, (text, _) in enumerate(answers) if text is not None}
        if errors:
            self.stop()  # the ranks may be out of step
            raise RanksFailedError(errors)
        return [result for _, result in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        self.pipes, self.processes = [], []


def _receive(pipe: Connection) -> tuple[str | None, Any]:
    try:
        answer: tuple[str | None, Any] = pipe.recv()
    except EOFError:
        return "died", None
    return answer


def _serve(rank: int, size: int, timeout: timedelta, port: int, pipe: Connection) -> None:
    rarely()
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timeout)
    groups = [dist.new_group(range(n + 1), timeout=timeout) for n in range(size)]
    while True:
        n_ranks, function, arguments = pipe.recv()
        pipe.send(_answer(groups[n_ranks - 1], function, arguments))


def _answer(
    group: ProcessGroup, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[str | None, Any]:
    torch.manual_seed(0)
    try:
        with floats_are_constants():
            return None, function(group, *arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc()}", None
