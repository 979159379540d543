"""The block's dense maps on the CPU: a few rows at a time, results in memory of large pages.

What stands between two steps stays in the caches and is never stored: a norm's result in either
pass, the gradient that it hands on. Torch's ops do the work. Each alone would write its result to
fresh memory, and for the system to hand that out takes half as long as the product that fills it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 2**20  # bytes of x for each thread: what the second cache holds


def project(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], norm: list[Tensor], eps: float,
    residual: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """See `kernels.reference.project`."""
    outs = [_new_rows(x, len(x), len(weight)) for weight in weights]
    for rows in _chunks(x):
        part, *_ = _normed(x[rows], norm, eps)
        for index, (weight, out) in enumerate(zip(weights, outs, strict=True)):
            if residual is None:
                torch.mm(part, weight.t(), out=out[rows])
            else:
                torch.addmm(residual[rows], part, weight.t(), out=out[rows])
            if biases:
                out[rows] += biases[index]
    return outs


def project_backward(
    grads: list[Tensor], x: Tensor, weights: list[Tensor], biases: list[Tensor],
    norm: list[Tensor], eps: float, needs_x: bool, needs_weights: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """The gradients of x, of weights, of biases and of the norm; no rows, or zeros, where x with
    the norm, or the weights, need none. Sums over rows are float32 or float64.
    """
    grad_x = _new_rows(x, len(x) if needs_x else 0, x.shape[1])
    of_weights, of_biases, of_norm = (_zeros(group) for group in (weights, biases, norm))
    for rows in _chunks(x):
        part, *moments = _normed(x[rows], norm, eps)
        parts = [grad[rows] for grad in grads]
        if needs_weights:
            _add(of_weights, [grad.t() @ part for grad in parts])
        if biases:
            _add(of_biases, [grad.sum(0) for grad in parts])
        if needs_x:
            _add(of_norm, _back_to_x(grad_x[rows], parts, weights, x[rows], norm, moments))
    return grad_x, _rounded(of_weights, x), _rounded(of_biases, x), _rounded(of_norm, x)


def _new_rows(like: Tensor, n_rows: int, n_columns: int) -> Tensor:
    made: Tensor = torch.ops.vicinal.new_rows(like, n_rows, n_columns)
    return made


def _chunks(x: Tensor) -> Iterator[slice]:
    row_bytes = x.shape[1] * x.element_size()
    step = max(1, _CHUNK * torch.get_num_threads() // row_bytes)
    return (slice(start, start + step) for start in range(0, len(x), step))


def _normed(x: Tensor, norm: list[Tensor], eps: float) -> tuple[Tensor, ...]:
    """The layer norm of x, its mean and inverse deviation; x alone if there is no norm."""
    if not norm:
        return (x,)
    weight, bias = norm
    return torch.native_layer_norm(x, x.shape[1:], weight, bias, eps)


def _back_to_x(
    grad_x: Tensor, grads: list[Tensor], weights: list[Tensor], x: Tensor,
    norm: list[Tensor], moments: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Fills ``grad_x``. Returns the gradients of the norm's weight and bias, if there is one."""
    torch.mm(grads[0], weights[0], out=grad_x)
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        grad_x.addmm_(grad, weight)
    if not norm:
        return []
    before_norm, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
        grad_x, x, x.shape[1:], *moments, *norm, [True] * 3
    )
    grad_x.copy_(before_norm)
    return [of_weight, of_bias]


def _zeros(like: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in like]


def _add(totals: list[Tensor], terms: list[Tensor]) -> None:
    for total, term in zip(totals, terms, strict=True):
        total += term


def _rounded(totals: list[Tensor], like: Tensor) -> list[Tensor]:
    return [total.to(like.dtype) for total in totals]
