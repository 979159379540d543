"""The registry of back ends: the only place that knows which exist and which of them runs."""

import importlib

import torch

from .._utils.checks import refuse
from .._utils.imports import when_imported
from .._utils.types import BackendName
from . import cpu, reference, triton
from .types import Backend

_BACKENDS = {
    "reference": reference.BACKEND,
    "cpu": cpu.BACKEND,
    "triton": triton.BACKEND,
}
_BY_DEVICE = {"cpu": "cpu", "cuda": "triton", "meta": "cpu"}


def _register_flop_formulas() -> None:
    for backend in ("cpu", "triton"):
        importlib.import_module(f".{backend}.flop_formulas", __package__)


# Importing it takes as long as all of vicinal, and only users of `FlopCounterMode` need it.
when_imported("torch.utils.flop_counter", _register_flop_formulas)


def prepare_backends() -> None:
    """Does what code that torch.compile traces cannot do: import Triton, warn of a missing kernel.

    Modules call it when they are constructed.
    """
    if torch.compiler.is_compiling():
        return
    if torch.cuda.is_available():
        triton.import_kernels()
    else:
        choose_backend(None, torch.device("cpu"))


def check_backend(backend: BackendName | None) -> None:
    """Raises ValueError for an unknown name."""
    if backend is not None and backend not in _BACKENDS:
        refuse("backend", f"None or one of {list(_BACKENDS)}", backend)


def choose_backend(
    backend: BackendName | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    head_dim: int = 0,
) -> Backend:
    """Returns the back end of that name; for None, the fastest for device, dtype and head width.

    Raises:
        ValueError: ``backend`` is unknown or cannot run on the device; the message says why.
    """
    check_backend(backend)
    if backend is None:
        fastest = _BY_DEVICE.get(device.type, "reference")
        if _unsupported_reason(fastest, device, dtype, head_dim) is not None:
            return _BACKENDS["reference"]
        return _BACKENDS[fastest]
    reason = _unsupported_reason(backend, device, dtype, head_dim)
    if reason is not None:
        refuse("backend", f"one that can run on {device}", f"{backend!r}: {reason}")
    return _BACKENDS[backend]


def _unsupported_reason(
    name: str, device: torch.device, dtype: torch.dtype | None, head_dim: int
) -> str | None:
    backend = _BACKENDS[name]
    if backend.max_head_dim is not None and head_dim > backend.max_head_dim:
        return f"heads are at most {backend.max_head_dim} wide"
    return backend.unsupported_reason(device, dtype)
