"""The block's dense maps: by the back end, unless somebody changed the modules that hold them."""

from torch import Tensor, nn

from .attention import autocasts
from .backends import Backend

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def project(
    backend: Backend, x: Tensor, linear: nn.Linear, norm: nn.LayerNorm | None = None, parts: int = 1
) -> tuple[Tensor, ...]:
    """``linear(norm(x))`` of ``x`` ``[n, E]``, its channels in ``parts``, each a tensor of its own:
    the gradient of parts of one would have to be put together first.
    """
    plain = _is_plain(linear, nn.Linear) and (norm is None or _is_plain(norm, nn.LayerNorm))
    if autocasts(x.device) or not plain:
        projected: Tensor = linear(x if norm is None else norm(x))
        return projected.chunk(parts, -1)
    biases = [] if linear.bias is None else linear.bias.chunk(parts)
    affine, eps = ([], 0.0) if norm is None else ([norm.weight, norm.bias], norm.eps)
    return backend.project(x, linear.weight.chunk(parts), biases, affine, eps, None)


def add_projected(backend: Backend, residual: Tensor, x: Tensor, linear: nn.Linear) -> Tensor:
    """``residual + linear(x)``, ``[n, E]``."""
    if autocasts(x.device) or not _is_plain(linear, nn.Linear):
        projected: Tensor = linear(x)
        return residual + projected
    biases = [] if linear.bias is None else [linear.bias]
    return backend.project(x, [linear.weight], biases, [], 0.0, residual)[0]


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling it is its kind's function and nothing more: no subclass, adapter or hook."""
    return (
        type(module) is kind
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and not any(getattr(module, hooks) for hooks in _HOOKS)
    )
