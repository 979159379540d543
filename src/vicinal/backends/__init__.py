"""The registry of back ends: the only place that knows which exist and which of them runs."""

import functools
import importlib

import torch

from .._utils.checks import refuse
from .._utils.imports import when_imported
from .._utils.types import BackendName
from .._utils.user_warnings import warn_user
from . import cpu, reference, triton
from .types import Backend

_BACKENDS: dict[BackendName, Backend] = {
    "reference": reference.BACKEND,
    "cpu": cpu.BACKEND,
    "triton": triton.BACKEND,
}
_BY_DEVICE: dict[str, BackendName] = {"cpu": "cpu", "cuda": "triton", "meta": "cpu"}


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
    if backend is not None and (not isinstance(backend, str) or backend not in _BACKENDS):
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
        reason = _unsupported_reason(fastest, device, dtype, head_dim)
        if reason is None:
            return _BACKENDS[fastest]
        if not torch.compiler.is_compiling() and reason == _BACKENDS[fastest].install_error():
            _warn_once(fastest, reason)
        return _BACKENDS["reference"]
    reason = _unsupported_reason(backend, device, dtype, head_dim)
    if reason is not None:
        refuse("backend", f"one that can run on {device}", f"{backend!r}: {reason}")
    return _BACKENDS[backend]


def unsupported_reasons() -> dict[BackendName, str | None]:
    """Why each back end cannot run on this machine, on a GPU if there is one; None if it can."""
    cpu_device = torch.device("cpu")
    gpu = torch.device("cuda") if torch.cuda.is_available() else cpu_device
    devices: dict[BackendName, torch.device] = {"triton": gpu}
    return {
        name: backend.unsupported_reason(devices.get(name, cpu_device), None)
        for name, backend in _BACKENDS.items()
    }


@functools.cache
def _warn_once(name: str, error: str) -> None:
    warn_user(
        f"vicinal: backend {name!r} is not available: {error}. Attention falls back to the slower "
        "backend 'reference'. vicinal.show_config() tells what can run.",
        RuntimeWarning,
    )


def _unsupported_reason(
    name: BackendName, device: torch.device, dtype: torch.dtype | None, head_dim: int
) -> str | None:
    backend = _BACKENDS[name]
    if backend.max_head_dim is not None and head_dim > backend.max_head_dim:
        return f"heads are at most {backend.max_head_dim} wide"
    return backend.unsupported_reason(device, dtype)
