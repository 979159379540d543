"""The CPU back end: C++ on PyTorch's stable ABI (`csrc/ops.cpp`)."""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import chunks, reference
from ..ops import Ops
from ..types import Backend, PlanTensors
from . import projection_ops, projections


def _load() -> str | None:
    """Loads the compiled kernel. Returns None, or the reason why that failed."""
    libraries = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not libraries:
        return "its kernel was not built when vicinal was installed (is there a C++ compiler?)"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"its kernel does not load: {error}"
    projections.register()
    return None


# Loaded on import: code that torch.compile traces cannot load a library. It defines its ops.
_LOAD_ERROR = _load()
_OPS = Ops("vicinal", "find_slices")


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: PlanTensors, background: tuple[Tensor, ...],
    bias: Tensor | None, query_mask: Tensor | None, seed: Tensor | None, scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `backends.reference.attend`."""
    tensors = [*plan.query_slices, plan.query_batch, plan.first_columns, plan.point_columns]
    tensors += [plan.window_rows, *plan.dropout_ids()]
    return _OPS.attend(
        q, k, v, tensors, plan.slices_per_level(), background, bias, query_mask, seed, scale,
        dropout_p,
    )  # fmt: skip


def project(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], norm: Sequence[Tensor],
    eps: float, residual: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `backends.reference.project`, which it calls if all rows fit in one chunk."""
    # A compiled graph is for any number of rows, so it must not depend on how many there are.
    if torch.compiler.is_compiling() or x.shape[0] > chunks.chunk_rows(x):
        return projection_ops.project(x, weights, biases, norm, eps, residual)
    return reference.project(x, weights, biases, norm, eps, residual)


def unsupported_reason(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why this back end cannot run on ``device``; None if it can."""
    if device.type == "meta":  # shapes alone
        return None
    if device.type != "cpu":
        return "it runs on CPUs only"
    if _LOAD_ERROR is not None and not torch.compiler.is_compiling():
        _warn_once()
    return _LOAD_ERROR


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"vicinal: backend 'cpu' is not available, {_LOAD_ERROR}; attention falls back to the "
        "slower backend 'reference'",
        RuntimeWarning,
        stacklevel=2,
    )


BACKEND = Backend(attend, _OPS.rotate, project, _OPS.find_slices, unsupported_reason)
