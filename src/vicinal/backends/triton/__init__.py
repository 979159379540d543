"""The GPU back end: kernels in Triton, which is imported when this back end is first chosen."""

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference, sampling_ops
from ..ops import Ops
from ..types import Backend, PlanTensors, window_tables
from .checks import PlanParts

_OPS = Ops(
    "vicinal_triton", "find_query_slices", "find_point_slices", "find_runs", "find_lists"
)  # fmt: skip
find_runs, find_lists = _OPS.find_runs, _OPS.find_lists
_MAX_HEAD_DIM = 256  # what shared memory and registers hold
_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32)
_import_error = None if importlib.util.find_spec("triton") else "Triton is not installed"


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: PlanTensors, background: tuple[Tensor, ...],
    bias: Tensor | None, query_mask: Tensor | None, seed: Tensor | None, scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `backends.reference.attend`."""
    assert plan.query_tiles is not None
    _, starts, stops, _ = plan.query_slices
    windows = window_tables(plan.windows, q.device, slots=bias is not None)
    parts = PlanParts(
        plan.query_tiles, windows, starts, stops, plan.point_columns, plan.dropout_ids(),
        plan.point_tiles,
    )  # fmt: skip
    return _OPS.attend(
        q, k, v, parts.tensors(), plan.slices_per_level(), background, bias, query_mask, seed,
        scale, dropout_p,
    )  # fmt: skip


def unsupported_reason(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why this back end cannot run on ``device`` with tensors of a dtype; None if it can."""
    if dtype == torch.float64:
        return "it computes in float32; use backend='reference' for float64"
    if dtype not in _DTYPES:
        return f"it does not support {dtype}"
    if device.type not in ("cuda", "cpu"):
        return "it needs a GPU"
    if not torch.compiler.is_compiling():  # code that is being traced cannot import
        import_kernels()
    return _import_error or _unsupported_device(device)


def install_error() -> str | None:
    """Why Triton cannot be used as it is installed; None if it can."""
    if not torch.compiler.is_compiling():
        import_kernels()
    return _import_error


def version() -> str | None:
    """The version of Triton, which this imports; None if it is not installed or fails to import."""
    if install_error() is not None:
        return None
    return str(sys.modules["triton"].__version__)


def _unsupported_device(device: torch.device) -> str | None:
    if device.type == "cpu":
        if interprets():
            return None
        return "it needs a GPU (with TRITON_INTERPRET=1 it runs on the CPU, slowly, for tests)"
    if interprets():
        return "TRITON_INTERPRET is set, so Triton runs on the CPU"
    if torch.version.hip is None and torch.cuda.get_device_properties(device).major < 8:
        return "it needs a compute capability of 8.0 or more"
    return None


def interprets() -> bool:
    """Whether Triton interprets kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def import_kernels() -> None:
    """Imports Triton and the kernels; what prevents that is kept for `unsupported_reason`."""
    global _import_error
    if _import_error is not None:
        return
    try:
        from . import ops  # noqa: F401
    except ImportError as error:
        _import_error = f"Triton cannot be imported: {error}"


def _importing(name: str) -> Callable[..., Any]:
    """The kernel of the op ``name``, whose module is imported when it is called."""

    def run(*arguments: Any) -> Any:
        return _kernels()[name](*arguments)

    return run


@functools.cache
def _kernels() -> dict[str, Callable[..., Any]]:
    kernels: dict[str, Callable[..., Any]] = importlib.import_module(".ops", __package__).KERNELS
    return kernels


_sample = sampling_ops.make_sample(_OPS.namespace)  # defines the ops
for _device in ("CPU", "CUDA"):  # on the CPU in Triton's interpreter
    _OPS.register(_device, {name: _importing(name) for name in _OPS.names + sampling_ops.NAMES})

BACKEND = Backend(
    attend,
    _OPS.rotate_unconverted,
    reference.project,
    reference.find_slices,  # of maps that `find_query_slices` does not take
    unsupported_reason,
    _MAX_HEAD_DIM,
    install_error,
    find_runs,
    find_lists,
    find_query_slices=_OPS.find_query_slices,
    find_point_slices=_OPS.find_point_slices,
    sample=_sample,
)
