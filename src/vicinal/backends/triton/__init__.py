"""The GPU back end: kernels in Triton (`triton.ops`), which are imported on first use."""

import functools
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..._utils.constants import computing
from .. import reference
from ..ops import Ops

if TYPE_CHECKING:
    from ...plan import NeighborhoodPlan

OPS = Ops("vicinal_triton", "find_runs", "find_flags")
find_slices, find_runs, rotate = OPS.find_slices, OPS.find_runs, OPS.rotate
project = reference.project
WIDEST = 256  # of heads: what shared memory and registers hold


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: "NeighborhoodPlan", background: tuple[Tensor, ...],
    query_mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `backends.reference.attend`."""
    slices = plan.query_slices
    flags = OPS.find_flags(k.detach(), v.detach())
    tensors = [*plan.query_tiles(find_runs), flags, *slices[1:3], plan.point_columns]
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        tensors += plan.point_tiles(find_runs)  # the backward pass must not plan
    return OPS.attend(
        q, k, v, tensors, plan.neighborhood_sizes, plan.position_dim,
        background, query_mask, seed, scale, dropout_p,
    )  # fmt: skip


def prepare(plan: "NeighborhoodPlan") -> None:
    """Finds the tiles that layers will ask for; those of points for gradients alone, but for plans
    of CUDA graphs, which nobody completes later.
    """
    if not plan.fits_32_bits:
        return  # another back end may take it
    plan.query_tiles(find_runs)
    if torch.is_grad_enabled() or computing(plan.device) == "graph":
        plan.point_tiles(find_runs)


@torch.compiler.assume_constant_result
def problem(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why this back end cannot run on ``device`` with tensors of a dtype, or None if it can."""
    if dtype == torch.float64:
        return "it computes in float32; float64 is left to 'reference'"
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
        return f"it does not take {dtype}"
    if device.type not in ("cuda", "cpu"):
        return "it runs on GPUs"
    interprets = _load()
    if isinstance(interprets, str):
        if device.type == "cuda":
            _warn(interprets)
        return interprets
    if device.type == "cuda" and interprets:
        return "TRITON_INTERPRET is set, so Triton runs on the CPU"
    nvidia = device.type == "cuda" and torch.version.hip is None
    if nvidia and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a compute capability of 8.0 or more"
    if device.type == "cpu" and not interprets:
        return "it runs on GPUs; on the CPU slowly, to be tested, if TRITON_INTERPRET=1 is set"
    return None


@functools.cache
def _load() -> bool | str:
    """Whether Triton interprets kernels on the CPU, or what keeps it from loading."""
    try:
        from . import ops as triton_ops
    except ImportError as error:
        return f"it needs Triton, which cannot be imported: {error}"
    OPS.register("CPU" if triton_ops.INTERPRETS else "CUDA", triton_ops.KERNELS)
    return triton_ops.INTERPRETS


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"vicinal: backend 'triton' is missing, {reason}; attention falls back on the slower "
        "backend 'reference'",
        RuntimeWarning,
        stacklevel=2,
    )
