"""How tests compile."""

import os
from contextlib import AbstractContextManager
from pathlib import Path

import torch

import vicinal


def floats_are_constants() -> AbstractContextManager[None]:
    """A context in which compilers take Python numbers, such as rates of dropout, as constants.

    With ``dynamic=True`` torch first traces them as inputs of the graph, finds that it needs their
    values, and traces everything again with constants. The graphs are the same, and tracing takes
    half as long.
    """
    context: AbstractContextManager[None] = torch._dynamo.config.patch(specialize_float=True)
    return context


def environment_for_gpus(**variables: str) -> dict[str, str]:
    """The environment of a process that compiles Triton's kernels for GPUs, without running them.

    It imports the library under test, which may be installed, and the benchmarks, which never are.
    """
    path = map(str, (Path(__file__).parents[1], Path(vicinal.__file__).parents[1]))
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(path)}
    environment.pop("TRITON_INTERPRET", None)
    return environment
