"""The back ends: the only place that knows which exist, and which of them runs."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import refuse
from .kernels import cpu, reference, triton


class Backend(NamedTuple):
    """A way to compute the four ops; see `kernels.reference` for what they do."""

    attend: Callable[..., tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    project: Callable[..., tuple[Tensor, ...]]
    find_slices: Callable[..., tuple[Tensor, Tensor]]
    problem: Callable[[torch.device, torch.dtype | None], str | None]
    """Why it cannot run on a device, with floating tensors of a dtype, or None."""


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
    ),
}
_BY_DEVICE = {"cpu": "cpu", "cuda": "triton"}


def check_backend(backend: str | None) -> None:
    """Refuses unknown names."""
    if backend is not None and backend not in _BACKENDS:
        refuse("backend", f"None or one of {list(_BACKENDS)}", backend)


def choose_backend(
    backend: str | None, device: torch.device, dtype: torch.dtype | None = None
) -> Backend:
    """The back end of that name, or if None the best for the device and the floating ``dtype``.

    Raises:
        ValueError: an unknown back end, or one that cannot run on the device (says why).
    """
    check_backend(backend)
    if backend is None:
        best = _BY_DEVICE.get(device.type, "reference")
        return _BACKENDS["reference" if _BACKENDS[best].problem(device, dtype) else best]
    problem = _BACKENDS[backend].problem(device, dtype)
    if problem is not None:
        refuse("backend", f"one that can run on {device}", f"{backend!r}: {problem}")
    return _BACKENDS[backend]
