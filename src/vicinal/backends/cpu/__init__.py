"""The CPU back end: C++ on PyTorch's stable ABI (`csrc/ops.cpp`), loaded on first use."""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference
from ..ops import Ops
from . import projection_ops, projections

if TYPE_CHECKING:
    from ...plan import NeighborhoodPlan

_OPS = Ops("vicinal")
find_slices, rotate = _OPS.find_slices, _OPS.rotate


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: "NeighborhoodPlan", background: tuple[Tensor, ...],
    query_mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `backends.reference.attend`."""
    tensors = (*plan.query_slices, plan.query_batch, plan.center_columns, plan.point_columns)
    return _OPS.attend(
        q, k, v, tensors, plan.neighborhood_sizes, plan.position_dim,
        background, query_mask, seed, scale, dropout_p,
    )  # fmt: skip


def project(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], norm: Sequence[Tensor],
    eps: float, residual: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `backends.reference.project`, which is faster where one chunk holds all rows."""
    # A compiled graph is for any number of rows: it must not ask how many there are.
    if torch.compiler.is_compiling() or x.shape[0] > projections.chunk_rows(x):
        return projection_ops.project(x, weights, biases, norm, eps, residual)
    return reference.project(x, weights, biases, norm, eps, residual)


@torch.compiler.assume_constant_result
def problem(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why this back end cannot run on ``device``, or None if it can."""
    return _load() if device.type == "cpu" else "it runs on the CPU alone"


@functools.cache
def _load() -> str | None:
    """Loads the compiled kernel once. Returns, and warns of, what is in the way."""
    libraries = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not libraries:
        reason = "its kernel was not built when vicinal was installed (is there a C++ compiler?)"
    else:
        try:
            torch.ops.load_library(str(libraries[0]))
            projections.register()
            return None
        except OSError as error:
            reason = f"its kernel does not load: {error}"
    warnings.warn(
        f"vicinal: backend 'cpu' is missing, {reason}; attention falls back on the slower "
        "backend 'reference'",
        RuntimeWarning,
        stacklevel=2,
    )
    return reason
