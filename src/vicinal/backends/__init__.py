"""The back ends: the only place that knows which exist, and which of them runs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._utils.checks import refuse
from . import cpu, reference, triton

if TYPE_CHECKING:
    from ..plan import NeighborhoodPlan


class Backend(NamedTuple):
    """A way to compute the four ops; see `backends.reference` for what they do."""

    attend: Callable[..., tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    project: Callable[..., tuple[Tensor, ...]]
    find_slices: Callable[..., tuple[Tensor, Tensor]]
    problem: Callable[[torch.device, torch.dtype | None], str | None]
    """Why it cannot run on a device, with floating tensors of a dtype, or None."""
    widest: int | None = None
    """The widest head that it takes."""
    prepare: Callable[["NeighborhoodPlan"], None] = lambda plan: None
    """Finds what it needs of a plan, so that no layer has to."""


_BACKENDS = {
    "reference": Backend(
        reference.attend,
        reference.rotate,
        reference.project,
        reference.find_slices,
        lambda device, dtype: None,
    ),
    "cpu": Backend(cpu.attend, cpu.rotate, cpu.project, cpu.find_slices, cpu.problem),
    "triton": Backend(
        triton.attend,
        triton.rotate,
        triton.project,
        triton.find_slices,
        triton.problem,
        triton.WIDEST,
        triton.prepare,
    ),
}
_BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}


def check_backend(backend: str | None) -> None:
    """Refuses unknown names."""
    if backend is not None and backend not in _BACKENDS:
        refuse("backend", f"None or one of {list(_BACKENDS)}", backend)


def choose_backend(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    width: int = 0,
) -> Backend:
    """The back end of that name, or if None the best for a device, floating dtype and head width.

    Raises:
        ValueError: an unknown back end, or one that cannot run on the device (says why).
    """
    check_backend(backend)
    if backend is None:
        best = _BY_DEVICE.get(device.type, "reference")
        return _BACKENDS["reference" if _problem(best, device, dtype, width) else best]
    problem = _problem(backend, device, dtype, width)
    if problem is not None:
        refuse("backend", f"one that can run on {device}", f"{backend!r}: {problem}")
    return _BACKENDS[backend]


def _problem(name: str, device: torch.device, dtype: torch.dtype | None, width: int) -> str | None:
    backend = _BACKENDS[name]
    if backend.widest is not None and width > backend.widest:
        return f"its heads are at most {backend.widest} wide"
    return backend.problem(device, dtype)
