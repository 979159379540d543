"""The block's dense projections on the CPU: a chunk of rows at a time, results in large pages.

Intermediate tensors, such as the normed rows and their gradient, stay in the caches and are never
stored. Torch's ops do the work. Each op alone would write its result to fresh memory, which the
system hands out page by page.
"""

import torch
from torch import Tensor

from ..chunks import add_terms, new_rows, rounded, row_chunks
from ..layer_norm import affine_terms, grad_input
from ..op_checks import checked


def register() -> None:
    """Registers the CPU kernels of the two ops. They need the compiled ``new_rows``."""
    for name, kernel in (("project", project), ("project_backward", project_backward)):
        torch.library.impl(f"vicinal::{name}", "CPU", checked(name, kernel))


def project(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], norm: list[Tensor], eps: float,
    residual: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """See `backends.reference.project`."""
    outs = [new_rows(x, len(x), len(weight)) for weight in weights]
    for rows in row_chunks(x):
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
    grad_x = new_rows(x, len(x) if needs_x else 0, x.shape[1])
    grad_weights: list[Tensor] = []
    grad_biases: list[Tensor] = []
    grad_norm: list[Tensor] = []
    for rows in row_chunks(x):
        part, *moments = _normed(x[rows], norm, eps)
        parts = [grad[rows] for grad in grads]
        if needs_weights:
            add_terms(grad_weights, [grad.t() @ part for grad in parts])
        if needs_biases:
            add_terms(grad_biases, [grad.sum(0) for grad in parts])
        if needs_x:
            add_terms(grad_norm, _grad_x(grad_x[rows], parts, weights, x[rows], norm, moments))
    return (
        grad_x,
        rounded(grad_weights, x.dtype),
        rounded(grad_biases, x.dtype),
        rounded(grad_norm, x.dtype),
    )


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
    mean, inverse_std = moments
    terms = affine_terms(grad_x, x, mean, inverse_std)
    grad_x.copy_(grad_input(grad_x, x, mean, inverse_std, norm[0]))
    return terms
