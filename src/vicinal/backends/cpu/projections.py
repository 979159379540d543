"""The block's dense maps on the CPU: a few rows at a time, results in memory of large pages.

What stands between two steps stays in the caches and is never stored: a norm's result in either
pass, the gradient that it hands on. Torch's ops do the work. Each alone would write its result to
fresh memory, 4 KiB at a time, and wait for the system to hand that out.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 2**21  # bytes of x that the second caches hold beside a result


def chunk_rows(x: Tensor) -> int:
    """How many rows of x are taken at a time. The number of threads is left out of it: sums over
    rows would depend on it.

    Wide rows are more than `_CHUNK`: each chunk reads all weights, which should not count.
    """
    width = x.shape[1]
    return max(1, _CHUNK // (width * x.element_size()), 2 * width)


def register() -> None:
    """Makes these the CPU's kernels of the two ops. They need the compiled ``new_rows``."""
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
            _product(out[rows], part, weight, terms)
    return outs


def project_backward(
    grads: list[Tensor], x: Tensor, weights: list[Tensor], norm: list[Tensor], eps: float,
    needs_x: bool, needs_weights: bool, needs_biases: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """The gradients of x, of weights, of biases and of the norm, which x's passes.

    What is not needed has no rows, or is an empty list. Weights may be too, where x needs nothing.
    """
    grad_x = _new_rows(x, len(x) if needs_x else 0, x.shape[1])
    of_weights: list[Tensor] = []
    of_biases: list[Tensor] = []
    of_norm: list[Tensor] = []
    for rows in _chunks(x):
        part, *moments = _normed(x[rows], norm, eps)
        parts = [grad[rows] for grad in grads]
        if needs_weights:
            _add(of_weights, [grad.t() @ part for grad in parts])
        if needs_biases:
            _add(of_biases, [grad.sum(0) for grad in parts])
        if needs_x:
            _add(of_norm, _back_to_x(grad_x[rows], parts, weights, x[rows], norm, moments))
    return grad_x, _rounded(of_weights, x), _rounded(of_biases, x), _rounded(of_norm, x)


def _new_rows(like: Tensor, n_rows: int, n_columns: int) -> Tensor:
    made: Tensor = torch.ops.vicinal.new_rows(like, n_rows, n_columns)
    return made


def _chunks(x: Tensor) -> Iterator[slice]:
    """At least one, of no rows where there are none."""
    step = chunk_rows(x)
    return (slice(start, start + step) for start in range(0, max(len(x), 1), step))


def _normed(x: Tensor, norm: list[Tensor], eps: float) -> tuple[Tensor, ...]:
    """The layer norm of x, its mean and inverse deviation; x alone if there is no norm."""
    if not norm:
        return (x,)
    weight, bias = norm
    return torch.native_layer_norm(x, x.shape[1:], weight, bias, eps)


def _product(out: Tensor, x: Tensor, weight: Tensor, terms: list[Tensor]) -> None:
    """``out = x @ weight.t() + sum(terms)``, the first of them added before it is rounded."""
    if terms:
        torch.addmm(terms[0], x, weight.t(), out=out)
    else:
        torch.mm(x, weight.t(), out=out)
    for term in terms[1:]:
        out += term


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


def _add(totals: list[Tensor], terms: list[Tensor]) -> None:
    """Adds to sums over chunks, which the first chunk begins: float32 or float64."""
    if not totals:
        totals += [term.to(torch.promote_types(term.dtype, torch.float32)) for term in terms]
        return
    for total, term in zip(totals, terms, strict=True):
        total += term


def _rounded(totals: list[Tensor], like: Tensor) -> list[Tensor]:
    return [total.to(like.dtype) for total in totals]
