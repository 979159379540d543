"""Names of stages in traces of `torch.profiler`."""

import contextlib
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

# `torch.profiler.record_function` takes a percent of a small plan's time, also without a profiler.
# This takes a microsecond. Its name is private: where it is missing, stages have no names.
_record: Callable[[str], AbstractContextManager[object]] | None = getattr(
    importlib.import_module("torch._C._profiler"), "_RecordFunctionFast", None
)


def stage(name: str) -> AbstractContextManager[object]:
    """Names what runs within, as ``vicinal::name``. Compiled graphs have no such names."""
    if _record is None or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _record(f"vicinal::{name}")
