"""The functional op: validates its arguments and calls a back end."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ._utils.checks import check_dropout, check_tensor, check_type, is_real, refuse
from ._utils.ragged import offsets_from_counts
from ._utils.types import BackendName
from .backends import choose_backend, reference
from .backends.types import slot_order
from .plan import NeighborhoodPlan, tensors_for

_BACKGROUND_NAMES = ("background.query", "background.key", "background.value")


class Background(NamedTuple):
    """What the empty cells of the windows hold; K cells per query.

    The logit of an empty cell is ``scale * query[i, l] . key[slot]``, with one query vector per
    level; its value is ``value[image, l]``. So a cell's key depends only on its offset within the
    window. Whatever depends on where the window lies goes into ``query``.

    Attributes:
        query: ``[N, L, H, d]``, the query vectors for empty cells, one per query and level.
        key: ``[K, H, d]``, one key per cell of the windows, levels in order, windows row-major.
        value: ``[B, L, H, dv]``, by image and level.

    Example:
        ```python
        import torch
        from vicinal import Background, FeaturePyramid, neighborhood_attention, plan_neighborhoods

        points = FeaturePyramid(torch.randn(1, 8), torch.tensor([[0, 2, 2, 0]]), [(8, 8)], 1)
        positions, offsets = torch.tensor([[2.5, 2.5]]), torch.tensor([0, 1])
        plan = plan_neighborhoods(positions, offsets, points, [3])
        q, k, v = (torch.randn(1, 2, 4) for _ in range(3))
        background = Background(q[:, None], torch.randn(9, 2, 4), torch.zeros(1, 1, 2, 4))
        out = neighborhood_attention(q, k, v, plan, background=background)
        ```
    """

    query: Tensor
    key: Tensor
    value: Tensor


class NeighborhoodWeights(NamedTuple):
    """Attention weights of n queries, ragged; from `neighborhood_attention_weights`.

    Attributes:
        offsets: int64 ``[n + 1]``: query ``i`` has the rows ``offsets[i]:offsets[i + 1]``.
        points: int64 ``[M]``, the points attended to, as rows of the pyramid; of a sharded module,
            as rows of `ShardedPlan.coordinates`, its own points and those of its neighbors.
        weights: ``[M, H]``, their softmax weights.
        background: ``[n, L, H]``, the sum over each level's empty cells, or None.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, neighborhood_attention_weights, plan_neighborhoods

        coordinates = torch.tensor([[0, 2, 2, 0], [0, 3, 2, 0], [0, 7, 7, 0]])
        points = FeaturePyramid(torch.randn(3, 8), coordinates, [(8, 8)], batch_size=1)
        plan = plan_neighborhoods(points.positions(), points.batch_offsets(), points, [3])
        q, k = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
        offsets, neighbors, weights, _ = neighborhood_attention_weights(q, k, plan)
        assert neighbors[offsets[2] : offsets[3]].tolist() == [2]  # the last point is alone
        ```
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
    bias: Tensor | None = None,
    query_mask: Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: BackendName | None = None,
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
    bias: Tensor | None = None,
    query_mask: Tensor | None = None,
    return_lse: Literal[True],
    backend: BackendName | None = None,
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
    bias: Tensor | None = None,
    query_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: BackendName | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attends from every query to all points in its neighborhood and to nothing else.

    The softmax streams over the neighborhood and saves only its log-sum-exp; the backward pass
    recomputes the weights (Dao et al., "FlashAttention", 2022). Results are the same bits on every
    run and for any number of threads. Under autocast, q, k, v and the background are cast.

    Args:
        q: ``[N, H, d]``, float16, bfloat16, float32 or float64. Half precisions are accumulated in
            float32.
        k: ``[nnz, H, d]``, in the pyramid's order. With periodic axes ``[nnz + C, H, d]``: the keys
            of the plan's copies come last.
        v: ``[nnz, H, dv]`` or ``[nnz + C, H, dv]``, likewise. `NeighborhoodPlan.append_copies`
            appends its rows of copies.
        plan: the neighbors of each query, from `plan_neighborhoods`.
        scale: factor of the logits; None (default): ``d ** -0.5``.
        dropout_p: probability of dropping a weight; the others are divided by ``1 - dropout_p``.
        background: what empty cells hold, also cells beyond the map. None (default): empty cells
            are not attended to.
        bias: ``[K, H]``, added to the scaled logit of whatever a cell of the windows holds, a point
            or the background; cells as in `Background.key`. None (default): no bias.
        query_mask: bool ``[N]``, True: the query is masked and its result is zero.
        return_lse: also return the log-sum-exp of the logits.
        backend: ``"cpu"`` or ``"triton"`` (GPUs; no float64, heads of at most 256 channels), both
            once differentiable; ``"reference"`` (slower, twice differentiable, any dtype and
            device); None (default): chosen by device, dtype and head width.

    Returns:
        ``[N, H, dv]`` in the dtype of q, zero for a query without neighbors. With ``return_lse``
        also the log-sum-exp ``[N, H]`` in float32 or float64, minus infinity for such queries.

    Raises:
        ValueError: shapes, dtypes or devices do not match each other or the plan, ``dropout_p`` is
            outside [0, 1), or the back end is unknown or cannot run on this device (the message
            says why).

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, neighborhood_attention, plan_neighborhoods

        cells = torch.randint(0, 16, (100, 2))
        points = torch.nn.functional.pad(cells, (1, 0))  # image, row, column
        values = torch.randn(100, 8)
        pyramid = FeaturePyramid.from_points(points, values, (16, 16), 1, strides=(1, 2))
        plan = plan_neighborhoods(pyramid.positions(), pyramid.batch_offsets(), pyramid, [3, 5])
        q, k, v = torch.randn(3, len(pyramid), 2, 4)  # 2 heads of 4 channels
        out = neighborhood_attention(q, k, v, plan)
        assert out.shape == (len(pyramid), 2, 4)
        ```
    """
    out, lse = attend(q, k, v, plan, scale, dropout_p, background, bias, query_mask, backend)
    return (out, lse) if return_lse else out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: NeighborhoodPlan,
    scale: float | None = None,
    dropout_p: float = 0.0,
    background: Background | None = None,
    bias: Tensor | None = None,
    query_mask: Tensor | None = None,
    backend: BackendName | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`neighborhood_attention` with its log-sum-exp.

    ``seed`` is that of the dropout, from `draw_seed`. None (default): it is drawn here.
    """
    check_dropout("dropout_p", dropout_p)
    check_scale(scale)
    operands, query_mask = _operands(plan, background, query_mask, q=q, k=k, v=v, bias=bias)
    bias = operands.pop("bias", None)
    q, k, v, *cells = operands.values()
    chosen = choose_backend(backend, q.device, q.dtype, max(q.shape[2], v.shape[2]))
    points_need_grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    tensors = tensors_for(plan, chosen, points_need_grad=points_need_grad)
    if seed is None:
        seed = draw_seed(dropout_p, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found: tuple[Tensor, Tensor] = chosen.attend(
        q, k, v, tensors, tuple(cells), bias, query_mask, seed, scale, dropout_p
    )
    return found


def check_scale(scale: Any) -> None:
    """Raises ValueError unless ``scale`` is None or a number."""
    if scale is None or (torch.compiler.is_compiling() and not isinstance(scale, Tensor)):
        return
    if not is_real(scale):
        refuse("scale", "a number; multiply q by a tensor", scale)


def draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed of one call's dropout, int64 and a scalar, or None without dropout."""
    return torch.randint(2**62, (), device=device) if dropout_p > 0 else None


def neighborhood_attention_weights(
    q: Tensor,
    k: Tensor,
    plan: NeighborhoodPlan,
    *,
    scale: float | None = None,
    background: Background | None = None,
    bias: Tensor | None = None,
    query_mask: Tensor | None = None,
    queries: Tensor | None = None,
) -> NeighborhoodWeights:
    """Returns the softmax weights of `neighborhood_attention`, for inspection.

    It stores one row per pair of a query and a neighbor, in plain PyTorch.

    Args:
        queries: integer ``[n]``, the queries to return; None (default): all of them.

    The other arguments, and the errors, are those of `neighborhood_attention`.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, neighborhood_attention_weights, plan_neighborhoods

        coordinates = torch.tensor([[0, 2, 2, 0], [0, 3, 2, 0], [0, 7, 7, 0]])
        points = FeaturePyramid(torch.randn(3, 8), coordinates, [(8, 8)], batch_size=1)
        plan = plan_neighborhoods(points.positions(), points.batch_offsets(), points, [3])
        q, k = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
        first = neighborhood_attention_weights(q, k, plan, queries=torch.tensor([0]))
        torch.testing.assert_close(first.weights.sum(0), torch.ones(2))
        ```
    """
    operands, query_mask = _operands(plan, background, query_mask, q=q, k=k, bias=bias)
    bias = operands.pop("bias", None)
    q, k, *cells = operands.values()
    if cells:
        cells[2] = cells[2][..., :0]  # values do not affect the weights
    queries = plan._check_queries(queries)
    check_scale(scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = plan._tensors
    row, column, logits, _ = reference.score_pairs(
        queries, q, k, k[..., :0], tensors, tuple(cells), bias, query_mask, scale
    )
    weights, _ = reference.softmax(logits, row, len(queries))
    n_pairs = int((column < plan.n_keys).sum())
    offsets = offsets_from_counts(torch.bincount(row[:n_pairs], minlength=len(queries)))
    empty = None
    if background is not None:
        level = reference.slot_levels(tensors)[column[n_pairs:] - plan.n_keys]
        empty = weights.new_zeros(len(queries) * plan.n_levels, q.shape[1])
        empty = empty.index_add(0, row[n_pairs:] * plan.n_levels + level, weights[n_pairs:])
        empty = empty.unflatten(0, (len(queries), plan.n_levels))
    points = plan.points_of_keys(column[:n_pairs])
    return NeighborhoodWeights(offsets, points, weights[:n_pairs], empty)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is enabled for the device; some devices do not support it."""
    if torch.compiler.is_compiling():  # in which torch 2.11 does not know is_autocast_available
        available = device.type != "meta"
    else:
        available = torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


def _autocast(x: Tensor) -> Tensor:
    if not autocasts(x.device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _operands(
    plan: NeighborhoodPlan,
    background: Background | None,
    query_mask: Tensor | None,
    **rows: Tensor | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The operands by name, cast under autocast, then the query mask.

    ``rows`` holds q and k, v where it is used, and the bias or None. The background's tensors
    follow them.

    Raises:
        ValueError: shapes, dtypes or devices do not match each other or the plan.
    """
    check_type("plan", plan, NeighborhoodPlan)
    device = plan.device
    q = check_tensor("q", rows["q"], (plan.n_queries, "H", "d"), kind="floating", device=device)
    heads, width = q.shape[1:]
    if width < 1:
        refuse("q", "a head width d of at least 1", q)
    if not isinstance(background, Background | None):
        refuse("background", "a Background or None", background)
    n_queries, n_keys, slots, n_levels = q.shape[0], plan.n_keys, plan.window_slots, plan.n_levels
    shapes: dict[str, tuple[int | str, ...]] = {
        "q": (n_queries, heads, width),
        "k": (n_keys, heads, width),
        "v": (n_keys, heads, "dv"),
        "bias": (slots, heads),
        "background.query": (n_queries, n_levels, heads, width),
        "background.key": (slots, heads, width),
        "background.value": (plan.batch_size, n_levels, heads, "dv"),
    }
    rows |= zip(_BACKGROUND_NAMES, background or (), strict=False)
    given = {name: x for name, x in rows.items() if name != "bias" or x is not None}
    operands = {
        name: _autocast(check_tensor(name, x, shapes[name], kind="floating", device=device))
        for name, x in given.items()
    }
    for name, x in operands.items():
        if x.dtype != operands["q"].dtype:
            refuse(name, f"the dtype of q, {operands['q'].dtype}", x)
    v, value = operands.get("v"), operands.get("background.value")
    if v is not None and value is not None and value.shape[-1] != v.shape[-1]:
        refuse("background.value", f"the width of v, {v.shape[-1]}", value)
    if query_mask is not None:
        mask = query_mask
        query_mask = check_tensor("query_mask", mask, (plan.n_queries,), kind="bool", device=device)
    for name in ("bias", "background.key"):
        if name in operands:  # back ends count the cells of windows row by row, along key axes
            order = slot_order(plan._windows, device)
            operands[name] = operands[name] if order is None else operands[name][order]
    return operands, query_mask
