"""The CPU back end: C++ on PyTorch's stable ABI (`csrc/ops.cpp`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import chunks, reference, sampling_ops
from ..ops import Ops
from ..types import Backend, PlanTensors
from . import library, projection_ops, projections


def _load() -> str | None:
    """Loads the compiled kernel. Returns None, or the reason why that failed."""
    file = library.find_library()
    if file is None:
        return library.missing_reason()
    try:
        torch.ops.load_library(str(file))
    except OSError as error:
        return library.load_failure(file, error)
    projections.register()
    return None


# Loaded on import: code that torch.compile traces cannot load a library. It defines its ops.
_LOAD_ERROR = _load()
_OPS = Ops("vicinal", "find_slices")
_INSTRUCTION_SETS = {16: "the baseline of the architecture", 32: "AVX2", 64: "AVX-512"}


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
    return _LOAD_ERROR


def install_error() -> str | None:
    """Why this back end cannot run at all as it is installed; None if it can."""
    return _LOAD_ERROR


def instruction_set() -> str | None:
    """The instruction set that the kernel uses on this processor; None without a kernel."""
    if _LOAD_ERROR is not None:
        return None
    return _INSTRUCTION_SETS[torch.ops.vicinal.vector_bytes()]


BACKEND = Backend(
    attend,
    _OPS.rotate,
    project,
    _OPS.find_slices,
    unsupported_reason,
    install_error=install_error,
    sample=sampling_ops.make_sample(_OPS.namespace),
)
