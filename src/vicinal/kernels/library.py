"""The attention op as torch sees it: schema, shapes, gradient. Compiled kernels implement it.

`torch.compile`, `torch.export`, saved-tensor hooks and `opcheck` work with whatever kernel is
registered for a device.
"""

from typing import Any

import torch
from torch import Tensor

from ..plan import NeighborhoodPlan

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? query_mask, Tensor? seed, Tensor[] background, "
    "Tensor[] plan, int[] neighborhood_sizes, int position_dim, float scale, float dropout_p"
)
_FORWARD = "vicinal::neighborhood_attention"
_BACKWARD = "vicinal::neighborhood_attention_backward"

torch.library.define(_FORWARD, f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(
    _BACKWARD,
    f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
)


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: NeighborhoodPlan, background: tuple[Tensor, ...],
    query_mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attended values ``[N, H, dv]`` and, in float32 or float64, the log-sum-exp ``[N, H]``."""
    tensors = [*plan.query_slices, *plan.point_slices]
    tensors += [plan.query_batch, plan.center_columns, plan.point_columns]
    result: tuple[Tensor, Tensor] = torch.ops.vicinal.neighborhood_attention(
        q, k, v, query_mask, seed, list(background), tensors,
        list(plan.neighborhood_sizes), plan.position_dim, scale, dropout_p,
    )  # fmt: skip
    return result


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


def _refuse_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "the compiled kernels are differentiable once; use backend='reference' for higher orders"
    )


torch.library.register_autograd(_BACKWARD, _refuse_double_backward)
