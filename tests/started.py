"""How tests start Python processes that share what takes long: the imports."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import forkserver
from typing import TYPE_CHECKING
from unittest import mock

from torch.multiprocessing.spawn import start_processes

from examples.training import processes

ENVIRONMENT = dict(os.environ)  # before any test changes it
ENVIRONMENT.pop("TRITON_INTERPRET", None)  # parts of Triton read it when it is imported

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

HEAVY = (
    "hypothesis",
    "pytest",
    "scipy.optimize",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "vicinal.detr",
    "vicinal.distributed",
)


def light_context() -> ForkServerContext | SpawnContext:
    """Starts processes by forking one that has imported much and has run nothing.

    They have one thread, the environment variables that the tests were started with, and a Triton
    that compiles. Where forking is not safe, each process imports everything itself.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*HEAVY])
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, environment, clear=True):
        forkserver.ensure_running()
    return context


def run_light(function: Callable[..., None], *arguments: object, timeout: float = 300) -> int:
    """The exit status of a process that calls a function of a module.

    After ``timeout`` seconds it is killed, and the test fails.
    """
    process = light_context().Process(target=function, args=arguments)
    process.start()
    process.join(timeout)
    status: int | None = process.exitcode
    if status is None:
        process.kill()
        process.join()
    assert status is not None, f"{function.__name__} did not end in {timeout} seconds"
    return status


@contextlib.contextmanager
def light_spawn() -> Iterator[None]:
    """Has `examples.training.processes.spawn_processes` start them by `light_context`."""
    method = light_context().get_start_method()
    spawn = partial(start_processes, start_method=method)
    with mock.patch.object(processes, "spawn", spawn):
        yield
