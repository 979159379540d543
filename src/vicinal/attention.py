"""The functional op: checks its arguments and hands them to a back end."""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._utils.checks import check_dropout, check_tensor, refuse
from .backends import choose_backend, reference
from .plan import NeighborhoodPlan

_CELLS = ("background.query", "background.key", "background.value")


class Background(NamedTuple):
    """What the empty cells of the windows hold; ``K = sum(w[l] ** P)`` counts a query's cells.

    An empty cell's logit is ``scale * query[i, l] . key[slot]`` for the query it has been given at
    that level, and its value is ``value[image, l]``. A cell's key thus depends on its place in the
    window alone; what depends on where the window lies belongs into ``query``.

    Attributes:
        query: ``[N, L, H, d]``, each query as the empty cells of each level see it.
        key: ``[K, H, d]``, a key per cell of the windows, levels in order, windows row-major.
        value: ``[B, L, H, dv]``, by image and level.
    """

    query: Tensor
    key: Tensor
    value: Tensor


class NeighborhoodWeights(NamedTuple):
    """Attention weights of n queries, ragged.

    Attributes:
        offsets: int64 ``[n + 1]``: query ``i`` has the rows ``offsets[i]:offsets[i + 1]``.
        points: int64 ``[M]``, the points it attends to, in the pyramid's order.
        weights: ``[M, H]``, their softmax weights.
        background: ``[n, L, H]``, the sum over each level's empty cells, or None.
    """

    offsets: Tensor
    points: Tensor
    weights: Tensor
    background: Tensor | None


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: NeighborhoodPlan,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    background: Background | None = None,
    query_mask: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: NeighborhoodPlan,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    background: Background | None = None,
    query_mask: Tensor | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: NeighborhoodPlan,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    background: Background | None = None,
    query_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Every query attends to all points in its neighborhood and to nothing else.

    The softmax runs as a stream over the neighborhood and saves only its log-sum-exp (Dao et al.,
    "FlashAttention", 2022); the backward pass computes the weights anew. The same bits on every
    run and for any number of threads. Under autocast q, k, v and the background are cast.

    Args:
        q: ``[N, H, d]``, in float16, bfloat16, float32 or float64; half precisions are summed in
            float32.
        k: ``[nnz, H, d]`` and v: ``[nnz, H, dv]``, in the pyramid's order.
        plan: who sees whom, from `plan_neighborhoods`.
        scale: what the logits are multiplied with; None: ``d ** -0.5``.
        dropout_p: the rate at which weights are dropped, the others divided by one minus it.
        background: what empty cells hold, also those beyond the map; None: they take no part.
        query_mask: bool ``[N]``, True: the query takes no part; its result is zero.
        return_lse: also return the log-sum-exp of the logits, ``[N, H]`` in float32 or float64,
            minus infinity where there is nothing to attend to.
        backend: ``"cpu"`` or ``"triton"`` (on GPUs, all but float64 and heads wider than 256),
            both differentiable once;
            ``"reference"`` (slower; differentiable twice, any dtype on any device); or None to
            choose by device and dtype.

    Returns:
        ``[N, H, dv]`` in q's dtype, zero for a query that sees nothing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other or the plan, ``dropout_p`` is
            outside [0, 1), or the backend is unknown or cannot run here (says why).
    """
    check_dropout("dropout_p", dropout_p)
    _check(q, k, plan, background, query_mask)
    check_tensor("v", v, (plan.n_points, q.shape[1], "dv"), kind="floating", device=q.device)
    if background is not None and background.value.shape[-1] != v.shape[-1]:
        refuse("background.value", f"the width of v, {v.shape[-1]}", background.value)
    q, k, v, *cells = _autocast(q, k, v, *(background or ()))
    _check_dtypes(q, k=k, v=v, **dict(zip(_CELLS, cells, strict=False)))
    width = max(q.shape[2], v.shape[2])
    attend = choose_backend(backend, q.device, q.dtype, width).attend
    seed = torch.randint(2**62, (), device=q.device) if dropout_p > 0 else None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attend(q, k, v, plan, tuple(cells), query_mask, seed, scale, dropout_p)
    return (out, lse) if return_lse else out


def neighborhood_attention_weights(
    q: Tensor,
    k: Tensor,
    plan: NeighborhoodPlan,
    *,
    scale: float | None = None,
    background: Background | None = None,
    query_mask: Tensor | None = None,
    queries: Tensor | None = None,
) -> NeighborhoodWeights:
    """The softmax weights that `neighborhood_attention` gives each point, for looking.

    Args:
        queries: integer ``[n]``, the queries to look at; None: all, which stores every pair.

    The other arguments, and the errors, are those of `neighborhood_attention`.
    """
    _check(q, k, plan, background, query_mask)
    q, k, *cells = _autocast(q, k, *(background or ()))
    _check_dtypes(q, k=k, **dict(zip(_CELLS, cells, strict=False)))
    if cells:
        cells[2] = cells[2][..., :0]  # values are of no use here
    queries = plan.check_queries(queries)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    row, column, logits, _ = reference.pairs(
        queries, q, k, k[..., :0], plan, tuple(cells), query_mask, scale
    )
    weights, _ = reference.softmax(logits, row, len(queries))
    n_pairs = int((column < plan.n_points).sum())
    counts = torch.bincount(row[:n_pairs], minlength=len(queries))
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    empty = None
    if background is not None:
        level = plan.slot_levels()[column[n_pairs:] - plan.n_points]
        empty = weights.new_zeros(len(queries) * plan.n_levels, q.shape[1])
        empty = empty.index_add(0, row[n_pairs:] * plan.n_levels + level, weights[n_pairs:])
        empty = empty.unflatten(0, (len(queries), plan.n_levels))
    return NeighborhoodWeights(offsets, column[:n_pairs], weights[:n_pairs], empty)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for the device; there are devices that do not know it."""
    known = torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device.type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check(
    q: Tensor,
    k: Tensor,
    plan: NeighborhoodPlan,
    background: Background | None,
    query_mask: Tensor | None,
) -> None:
    check_tensor("q", q, (plan.n_queries, "H", "d"), kind="floating", device=plan.device)
    heads, width = q.shape[1:]
    if width < 1:
        refuse("q", "a head width d of at least 1", q)
    if not isinstance(background, Background | None):
        refuse("background", "a Background or None", background)
    shapes: dict[str, tuple[Tensor, tuple[int | str, ...]]] = {
        "k": (k, (plan.n_points, heads, width))
    }
    if background is not None:
        sizes: tuple[tuple[int | str, ...], ...] = (
            (plan.n_queries, plan.n_levels, heads, width),
            (plan.window_slots, heads, width),
            (plan.batch_size, plan.n_levels, heads, "dv"),
        )
        shapes |= dict(zip(_CELLS, zip(background, sizes, strict=True), strict=True))
    for name, (tensor, shape) in shapes.items():
        check_tensor(name, tensor, shape, kind="floating", device=q.device)
    if query_mask is not None:
        check_tensor("query_mask", query_mask, (plan.n_queries,), kind="bool", device=q.device)


def _check_dtypes(q: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.dtype != q.dtype:
            refuse(name, f"the dtype of q, {q.dtype}", tensor)
