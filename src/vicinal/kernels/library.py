"""Our ops as torch sees them: schema, shapes, gradient. Kernels register for a device.

`torch.compile`, `torch.export`, saved-tensor hooks and `opcheck` work with whatever kernel that is.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

if TYPE_CHECKING:
    from ..plan import NeighborhoodPlan

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? query_mask, Tensor? seed, Tensor[] background, "
    "Tensor[] plan, int[] neighborhood_sizes, int position_dim, float scale, float dropout_p"
)
_FORWARD = "vicinal::neighborhood_attention"
_BACKWARD = "vicinal::neighborhood_attention_backward"
_ROTATE = "vicinal::rotate"
_ROTATE_BACKWARD = "vicinal::rotate_backward"
_PROJECT = "vicinal::project"
_PROJECT_BACKWARD = "vicinal::project_backward"

torch.library.define(_FORWARD, f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(
    _BACKWARD,
    f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
)
torch.library.define(_ROTATE, "(Tensor x, Tensor coordinates, Tensor frequencies) -> Tensor")
torch.library.define(
    _ROTATE_BACKWARD,
    "(Tensor grad_out, Tensor out, Tensor coordinates, Tensor frequencies) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    _PROJECT,
    "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norm, float eps, Tensor? residual) "
    "-> Tensor[]",
)
torch.library.define(
    _PROJECT_BACKWARD,
    "(Tensor[] grads, Tensor x, Tensor[] weights, Tensor[] norm, float eps, "
    "bool needs_x, bool needs_weights, bool needs_biases) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[])",
)
torch.library.define("vicinal::new_rows", "(Tensor like, int n_rows, int n_columns) -> Tensor")
torch.library.define(
    "vicinal::find_slices",
    "(Tensor sorted_keys, Tensor centers, Tensor visits, Tensor level, Tensor offset, "
    "Tensor radius) -> (Tensor, Tensor)",
)


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: "NeighborhoodPlan", background: tuple[Tensor, ...],
    query_mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attended values ``[N, H, dv]`` and, in float32 or float64, the log-sum-exp ``[N, H]``."""
    columns = (plan.query_batch, plan.center_columns, plan.point_columns)
    tensors = [*plan.query_slices, *columns]
    result: tuple[Tensor, Tensor] = torch.ops.vicinal.neighborhood_attention(
        q, k, v, query_mask, seed, list(background), tensors,
        list(plan.neighborhood_sizes), plan.position_dim, scale, dropout_p,
    )  # fmt: skip
    return result


def rotate(x: Tensor, coordinates: Tensor, frequencies: Tensor) -> Tensor:
    """``x`` ``[n, H, d]``, its channel pairs turned by ``coordinates @ frequencies``, which are
    ``[n, C]`` and ``[C, H or 1, d / 2]``.
    """
    sums = torch.promote_types(x.dtype, coordinates.dtype)
    storage = torch.float64 if sums == torch.float64 else x.dtype
    coordinates, frequencies = (y.to(sums).contiguous() for y in (coordinates, frequencies))
    table = frequencies.expand(-1, x.shape[1], -1).contiguous()
    turned: Tensor = torch.ops.vicinal.rotate(x.to(storage), coordinates, table)
    return turned.to(x.dtype)


def project(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], norm: Sequence[Tensor],
    eps: float, residual: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``residual + norm(x) @ weight.t() + bias`` for each of the weights; see `reference`."""
    lists = (list(group) for group in (weights, biases, norm))
    return tuple(torch.ops.vicinal.project(x, *lists, eps, residual))


def find_slices(
    sorted_keys: Tensor, centers: Tensor, visits: Tensor, level: Tensor, offset: Tensor,
    radius: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where the rows of windows begin and end among ``sorted_keys``, int32 ``[N, R]`` each, for
    keys of ``centers`` ``[L, N]`` and rows of a level, offset and radius, ``[R]``.
    """
    slices: tuple[Tensor, Tensor] = torch.ops.vicinal.find_slices(
        sorted_keys, centers, visits, level, offset, radius
    )
    return slices


@torch.library.register_fake(_FORWARD)
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=lse_dtype)


@torch.library.register_fake(_BACKWARD)
def _(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    query_mask: Tensor | None, seed: Tensor | None, background: list[Tensor], *_: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    return grads[0], grads[1], grads[2], [x.new_empty(x.shape) for x in background]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, query_mask, seed, background, plan, *ctx.settings = inputs
    ctx.n_background = len(background)
    ctx.save_for_backward(*output, q, k, v, query_mask, seed, *background, *plan)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    out, lse, q, k, v, query_mask, seed, *rest = ctx.saved_tensors
    background, plan = rest[: ctx.n_background], rest[ctx.n_background :]
    grad_q, grad_k, grad_v, grad_background = torch.ops.vicinal.neighborhood_attention_backward(
        grad_out, grad_lse, out, lse, q, k, v, query_mask, seed, background, plan, *ctx.settings
    )
    without = [None] * len(plan), None, None, None, None
    return grad_q, grad_k, grad_v, None, None, grad_background, *without


torch.library.register_autograd(_FORWARD, _backward, setup_context=_setup_context)


@torch.library.register_fake(_ROTATE)
def _(x: Tensor, coordinates: Tensor, frequencies: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake(_ROTATE_BACKWARD)
def _(
    grad_out: Tensor, out: Tensor, coordinates: Tensor, frequencies: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return out.new_empty(out.shape), torch.empty_like(coordinates), torch.empty_like(frequencies)


def _setup_rotate(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    # The result instead of the input: turned by a right angle it is the slope in the angles.
    ctx.save_for_backward(output, *inputs[1:])


def _backward_rotate(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.vicinal.rotate_backward(
        grad_out, *ctx.saved_tensors
    )
    return grads


torch.library.register_autograd(_ROTATE, _backward_rotate, setup_context=_setup_rotate)


@torch.library.register_fake(_PROJECT)
def _(x: Tensor, weights: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


@torch.library.register_fake(_PROJECT_BACKWARD)
def _(
    grads: list[Tensor], x: Tensor, weights: list[Tensor], norm: list[Tensor], eps: float,
    needs_x: bool, needs_weights: bool, needs_biases: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    widths = [grad.shape[1] for grad in grads]
    return (
        x.new_empty(x.shape[0] if needs_x else 0, x.shape[1]),
        [x.new_empty(width, x.shape[1]) for width in widths if needs_weights],
        [x.new_empty(width) for width in widths if needs_biases],
        [x.new_empty(x.shape[1]) for _ in norm if needs_x],
    )


@register_flop_formula(torch.ops.vicinal.project)
def _(x: list[int], weights: list[list[int]], *_: Any, **__: Any) -> int:
    return sum(2 * x[0] * math.prod(weight) for weight in weights)


@register_flop_formula(torch.ops.vicinal.project_backward)
def _(
    grads: list[list[int]], x: list[int], weights: Any, norm: Any, eps: float,
    needs_x: bool, needs_weights: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return sum(2 * math.prod(grad) * x[1] for grad in grads) * (needs_x + needs_weights)


@torch.library.register_fake("vicinal::new_rows")
def _(like: Tensor, n_rows: int, n_columns: int) -> Tensor:
    return like.new_empty(n_rows, n_columns)


def _setup_project(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, norm, ctx.eps, _ = inputs
    ctx.lengths = len(weights), len(biases), len(norm)
    # Weights count for x alone: whoever trains nothing before them may change them in place.
    ctx.needs_x = any(part.requires_grad for part in (x, *norm))
    ctx.save_for_backward(x, *norm, *(weights if ctx.needs_x else ()))


def _backward_project(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    _, of_weights, of_biases, _, _, of_residual = ctx.needs_input_grad
    x, *parameters = ctx.saved_tensors
    norm, weights = parameters[: ctx.lengths[2]], parameters[ctx.lengths[2] :]
    grad_x, *lists = torch.ops.vicinal.project_backward(
        grads, x, weights, norm, ctx.eps, ctx.needs_x, any(of_weights), any(of_biases)
    )
    lists = [part or [None] * n for part, n in zip(lists, ctx.lengths, strict=True)]
    grad_residual = functools.reduce(operator.add, grads) if of_residual else None
    return grad_x if ctx.needs_x else None, *lists, None, grad_residual


torch.library.register_autograd(_PROJECT, _backward_project, setup_context=_setup_project)


@torch.library.register_fake("vicinal::find_slices")
def _(
    sorted_keys: Tensor, centers: Tensor, visits: Tensor, level: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor]:
    starts = centers.new_empty(centers.shape[1], len(level), dtype=torch.int32)
    return starts, torch.empty_like(starts)


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "the compiled kernels are differentiable once; use backend='reference' for higher orders"
    )


torch.library.register_autograd(_BACKWARD, _refuse_double_backward)
torch.library.register_autograd(_ROTATE_BACKWARD, _refuse_double_backward)
torch.library.register_autograd(_PROJECT_BACKWARD, _refuse_double_backward)
