"""The block's dense projections, computed by the back end where modules are unmodified.

The back end gets the tensors that the modules hold; see `backends.reference.project`. It bypasses
calling the modules, so it must not skip hooks. Torch has no public way to ask for them: where its
private names are missing, the modules are called.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._utils.checks import refuse
from ..attention import autocasts
from ..backends.layer_norm import layer_norm
from ..backends.types import Backend
from .row_dropout import RowDropout

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_has_any_global_hook: Callable[[], bool] | None
try:
    _has_any_global_hook = importlib.import_module("torch.nn.modules.module")._has_any_global_hook
except (ImportError, AttributeError):
    _has_any_global_hook = None


def check_dtype(argument: str, value: Tensor, of: nn.Module | torch.dtype) -> None:
    """Raises ValueError unless ``value`` has the dtype ``of`` a module's first parameter, if it has
    one, or autocast casts both.
    """
    if isinstance(of, nn.Module):
        of = next((parameter.dtype for parameter in of.parameters()), value.dtype)
    dtype = of
    casts = autocasts(value.device) and torch.float64 not in (value.dtype, dtype)
    if value.dtype != dtype and not casts:
        refuse(argument, f"the dtype of the module, {dtype}", value)


def project(
    backend: Backend, x: Tensor, linear: nn.Linear, norm: nn.Module | None = None, parts: int = 1
) -> tuple[Tensor, ...]:
    """``linear(norm(x))`` for ``x`` ``[n, E]``, its channels in ``parts`` of equal width.

    Returns ``[n, width]`` each. A back end allocates each part by itself: the gradients of parts of
    one tensor would have to be concatenated first.
    """
    if not (_is_unmodified(linear, x) and (norm is None or _is_unmodified(norm, x))):
        projected: Tensor = linear(x if norm is None else call_norm(norm, x))
        return projected.chunk(parts, -1)
    affine, eps = ([], 0.0) if norm is None else ([norm.weight, norm.bias], norm.eps)
    return backend.project(
        x, _parts(linear.weight, parts), _parts(linear.bias, parts), affine, eps, None
    )


def add_projected(backend: Backend, residual: Tensor, x: Tensor, linear: nn.Linear) -> Tensor:
    """``residual + linear(x)`` for ``x`` ``[n, E]`` and ``residual`` ``[n, width]``."""
    if not _is_unmodified(linear, x):
        projected: Tensor = linear(x)
        return residual + projected
    weights, biases = _parts(linear.weight, 1), _parts(linear.bias, 1)
    return backend.project(x, weights, biases, [], 0.0, residual)[0]


def call_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` in the dtype of ``x``, computed in that of the norm's weight, if it has one.

    An unmodified layer norm has gradients with the same bits for any number of CPU threads.
    """
    weight = getattr(norm, "weight", None)
    rows = x
    if isinstance(weight, Tensor) and not autocasts(x.device):
        rows = x.to(weight.dtype)
    if isinstance(norm, nn.LayerNorm) and _is_plain(norm) and norm.normalized_shape == x.shape[1:]:
        return layer_norm(rows, norm.weight, norm.bias, norm.eps).to(x.dtype)
    normed: Tensor = norm(rows)
    return normed if autocasts(x.device) else normed.to(x.dtype)


def is_inactive_dropout(dropout: nn.Module) -> bool:
    """Whether calling the module would return its input and do nothing else."""
    inactive = type(dropout) is nn.Identity
    if isinstance(dropout, nn.Dropout) and type(dropout) in (nn.Dropout, RowDropout):
        inactive = dropout.p == 0 or not dropout.training
    return inactive and "forward" not in vars(dropout) and not _has_hooks(dropout)


def call_dropout(dropout: nn.Module, x: Tensor, row_ids: Tensor | None) -> Tensor:
    """``dropout(x)`` for ``x`` ``[n, E]``; a `RowDropout` gets ids of the rows, if there are any.

    Modules that users put in its place take one argument.
    """
    if row_ids is not None and isinstance(dropout, RowDropout):
        dropped: Tensor = dropout(x, row_ids)
    else:
        dropped = dropout(x)
    return dropped


def _parts(parameter: Tensor | None, parts: int) -> list[Tensor]:
    """The rows in equal parts; the parameter itself for one part, so that autograd has no view."""
    if parameter is None:
        return []
    if parts == 1:
        return [parameter]
    rows = len(parameter) // parts
    return [parameter.narrow(0, part * rows, rows) for part in range(parts)]


def _is_unmodified(module: nn.Module, x: Tensor) -> bool:
    """Whether the back end may compute the module: it `_is_plain`, in the dtype of ``x``, a norm
    with weight and bias, and autocast is off.
    """
    if autocasts(x.device) or not _is_plain(module):
        return False
    has_bias = isinstance(module, nn.Linear) or module.bias is not None
    return has_bias and module.weight.dtype == x.dtype


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module runs the function of its class on its weight and bias, and nothing
    else: it has no subclass, adapter or hook.
    """
    if type(module) not in (nn.Linear, nn.LayerNorm):
        return False
    has_types = type(module.weight) is nn.Parameter and (
        module.bias is None or type(module.bias) is nn.Parameter
    )
    return has_types and "forward" not in vars(module) and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module may run hooks; True where torch does not tell."""
    if _has_any_global_hook is None or _has_any_global_hook():
        return True
    return any(vars(module).get(hooks, True) for hooks in _HOOKS)
