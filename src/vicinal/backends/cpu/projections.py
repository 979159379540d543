"""The block's dense projections on the CPU: a chunk of rows at a time, results in large pages.

Intermediate tensors, such as the normed rows and their gradient, stay in the caches and are never
stored. Torch's ops do the work. Each op alone would write its result to fresh memory, which the
system hands out page by page.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 2**21  # bytes of x that fit the level-2 cache beside a result


def chunk_rows(x: Tensor) -> int:
    """The number of rows of a chunk. It does not depend on the number of threads, else the order of
    sums, and so the bits, would.

    Chunks of wide rows exceed `_CHUNK`, so that reading the weights once a chunk costs little.
    """
    width = x.shape[1]
    return max(1, _CHUNK // (width * x.element_size()), 2 * width)


def register() -> None:
    """Registers the CPU kernels of the two ops. They need the compiled ``new_rows``."""
    torch.library.impl("vicinal::project", "CPU", project)
    torch.library.impl("vicinal::project_backward", "CPU", project_backward)


def project(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], norm: list[Tensor], eps: float,
    residual: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """See `backends.reference.project`."""
    outs = [_new_rows(x, len(x), len(weight)) for weight in weights]
    for rows in _chunks(x):
        part, *_ = _normed(x[rows], norm, eps)
        for index, (weight, out) in enumerate(zip(weights, outs, strict=True)):
            terms = [biases[index]] if biases else []
            if residual is not None:
                terms.append(residual[rows])
            _linear(out[rows], part, weight, terms)
    return outs


def project_backward(
    grads: list[Tensor], x: Tensor, weights: list[Tensor], norm: list[Tensor], eps: float,
    needs_x: bool, needs_weights: bool, needs_biases: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """The gradients of x, of the weights, of the biases and, with that of x, of the norm.

    A gradient that is not needed has no rows or is an empty list. ``weights`` may be empty where x
    needs no gradient.
    """
    grad_x = _new_rows(x, len(x) if needs_x else 0, x.shape[1])
    grad_weights: list[Tensor] = []
    grad_biases: list[Tensor] = []
    grad_norm: list[Tensor] = []
    for rows in _chunks(x):
        part, *moments = _normed(x[rows], norm, eps)
        parts = [grad[rows] for grad in grads]
        if needs_weights:
            _add(grad_weights, [grad.t() @ part for grad in parts])
        if needs_biases:
            _add(grad_biases, [grad.sum(0) for grad in parts])
        if needs_x:
            _add(grad_norm, _grad_x(grad_x[rows], parts, weights, x[rows], norm, moments))
    return grad_x, _rounded(grad_weights, x), _rounded(grad_biases, x), _rounded(grad_norm, x)


def _new_rows(like: Tensor, n_rows: int, n_columns: int) -> Tensor:
    made: Tensor = torch.ops.vicinal.new_rows(like, n_rows, n_columns)
    return made


def _chunks(x: Tensor) -> Iterator[slice]:
    """The chunks of rows, at least one, which is empty if ``x`` is."""
    step = chunk_rows(x)
    return (slice(start, start + step) for start in range(0, max(len(x), 1), step))


def _normed(x: Tensor, norm: list[Tensor], eps: float) -> tuple[Tensor, ...]:
    """The layer norm of x, its mean and inverse standard deviation; x alone without a norm."""
    if not norm:
        return (x,)
    weight, bias = norm
    return torch.native_layer_norm(x, x.shape[1:], weight, bias, eps)


def _linear(out: Tensor, x: Tensor, weight: Tensor, terms: list[Tensor]) -> None:
    """``out = x @ weight.t() + sum(terms)``; the first term is added before rounding."""
    if terms:
        torch.addmm(terms[0], x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out=out)
    for term in terms[1:]:
        out += term


def _grad_x(
    grad_x: Tensor, grads: list[Tensor], weights: list[Tensor], x: Tensor,
    norm: list[Tensor], moments: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Fills ``grad_x``. Returns the gradients of the norm's weight and bias, if there is one."""
    torch.mm(grads[0], weights[0], out=grad_x)
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        grad_x.addmm_(grad, weight)
    if not norm:
        return []
    # Torch sums the gradients of weight and bias in an order that depends on the threads.
    before_norm, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad_x, x, x.shape[1:], *moments, *norm, [True, False, False]
    )
    grads_norm = _grad_norm(grad_x, x, *moments)
    grad_x.copy_(before_norm)
    return grads_norm


def _grad_norm(grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor) -> list[Tensor]:
    """The gradients of the norm's weight and bias, sums over rows by `Tensor.sum`, which gives
    each thread whole columns.
    """
    dtype = torch.promote_types(mean.dtype, torch.float32)
    inverse_std = inverse_std.to(dtype)
    standardized = torch.addcmul(-mean.to(dtype) * inverse_std, x, inverse_std)
    return [standardized.mul_(grad).sum(0), grad.sum(0, dtype=dtype)]


def _add(sums: list[Tensor], terms: list[Tensor]) -> None:
    """Adds the terms of a chunk to the sums over chunks, in float32 or float64."""
    if not sums:
        sums += [term.to(torch.promote_types(term.dtype, torch.float32)) for term in terms]
        return
    for total, term in zip(sums, terms, strict=True):
        total += term


def _rounded(sums: list[Tensor], like: Tensor) -> list[Tensor]:
    return [total.to(like.dtype) for total in sums]
