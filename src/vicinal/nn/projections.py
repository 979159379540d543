"""The block's dense maps: by the back end, unless somebody changed the modules that hold them.

What the back end is given is what the modules hold, as tensors; see `backends.reference.project`.
"""

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..attention import autocasts
from ..backends.types import Backend

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def project(
    backend: Backend, x: Tensor, linear: nn.Linear, norm: nn.LayerNorm | None = None, parts: int = 1
) -> tuple[Tensor, ...]:
    """``linear(norm(x))`` of ``x`` ``[n, E]``, its channels as ``parts`` of equal width.

    ``[n, width]`` each, in memory of its own where the back end computes it: the gradient of parts
    of one tensor would have to be put together first.
    """
    if not (_is_plain(linear, x) and (norm is None or _is_plain(norm, x))):
        projected: Tensor = linear(x if norm is None else norm(x))
        return projected.chunk(parts, -1)
    affine, eps = ([], 0.0) if norm is None else ([norm.weight, norm.bias], norm.eps)
    return backend.project(
        x, _parts(linear.weight, parts), _parts(linear.bias, parts), affine, eps, None
    )


def add_projected(backend: Backend, residual: Tensor, x: Tensor, linear: nn.Linear) -> Tensor:
    """``residual + linear(x)``, of ``x`` ``[n, E]`` and ``residual`` ``[n, width]``."""
    if not _is_plain(linear, x):
        projected: Tensor = linear(x)
        return residual + projected
    weights, biases = _parts(linear.weight, 1), _parts(linear.bias, 1)
    return backend.project(x, weights, biases, [], 0.0, residual)[0]


def _parts(parameter: Tensor | None, parts: int) -> list[Tensor]:
    """Its rows in equal shares; itself if that is one, so that autograd sees no view."""
    if parameter is None:
        return []
    if parts == 1:
        return [parameter]
    rows = len(parameter) // parts
    return [parameter.narrow(0, part * rows, rows) for part in range(parts)]


def _is_plain(module: nn.Module, x: Tensor) -> bool:
    """Whether calling it is its kind's function and nothing more: no subclass, adapter or hook,
    nothing that autocast would round.
    """
    kind = type(module)
    if kind not in (nn.Linear, nn.LayerNorm) or autocasts(x.device):
        return False
    no_bias = kind is nn.Linear and module.bias is None
    parameters = [module.weight] if no_bias else [module.weight, module.bias]
    return (
        all(type(parameter) is nn.Parameter for parameter in parameters)
        and "forward" not in vars(module)
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and not _has_any_global_hook()
    )
