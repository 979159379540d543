"""How tests compile."""

import contextlib
import os
import sys
import traceback
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from garbage import rarely
from started import run_light


def floats_are_constants(constants: bool = True) -> AbstractContextManager[None]:
    """A context in which compilers take Python numbers, such as rates of dropout, as constants.

    With ``constants=False``, as torch has it by default, ``dynamic=True`` first traces them as
    inputs of the graph, finds that it needs their values, and traces everything again with
    constants. The graphs are the same, and tracing once takes half as long.
    """
    context: AbstractContextManager[None] = torch._dynamo.config.patch(specialize_float=constants)
    return context


def compile_for_gpus(code: str, *arguments: str, cache: Path | None = None) -> list[str]:
    """The lines that ``code`` prints in a process that compiles Triton's kernels, and runs none.

    Args:
        code: of a module, not of a kernel.
        *arguments: what follows the first of ``sys.argv``.
        cache: a folder for kernels, Triton's own by default.
    """
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        status = run_light(_execute, code, arguments, cache, log, timeout=1200)
        printed = log.read_text()
    assert status == 0, printed[-2000:]
    return printed.splitlines()


def _execute(code: str, arguments: tuple[str, ...], cache: Path | None, log: Path) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    if cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(cache)
    sys.argv[1:] = arguments
    warnings.simplefilter("error")
    rarely()
    with log.open("w") as file, contextlib.redirect_stdout(file):
        try:
            exec(code, {"__name__": "code"})
        except BaseException:
            traceback.print_exc(file=file)
            raise
