"""Attention modules of which every rank has its own queries and points."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._utils.caching import cached
from .._utils.checks import check_type, describe, refuse
from .._utils.ragged import take_rows
from ..attention import Background, draw_seed
from ..detr import (
    Decoder,
    DecoderLayer,
    DenoisingQueryGenerator,
    PointStem,
    QuerySelection,
    SetCriterion,
)
from ..nn._base import Inputs
from ..nn.block import SparseNeighborhoodAttentionBlock
from ..nn.deformable import SparseDeformableAttention
from ..plan import NeighborhoodPlan
from ..pyramid import FeaturePyramid
from .deformable import ShardedDeformable
from .detection import (
    ShardedCriterion,
    ShardedDecoder,
    ShardedDecoderLayer,
    ShardedDenoiser,
    ShardedSelection,
    ShardedStem,
)
from .groups import Group, GroupHandle, agree, as_group
from .interior import QueryPart, divide_queries
from .plan import ShardedPlan, plan_sharded

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class ShardedBlock(SparseNeighborhoodAttentionBlock):
    """A block that attends to the points of all ranks, made by `shard_attention`."""

    _plan_type = ShardedPlan
    _handle: GroupHandle

    def make_plan(
        self,
        query_spatial_positions: Tensor,
        query_batch_offsets: Tensor,
        pyramid: FeaturePyramid,
        query_level_indices: Tensor | None = None,
        *,
        check_contents: bool | None = None,
    ) -> ShardedPlan:
        """Makes the ``plan`` of `forward`: `plan_sharded` with the windows of this block. All ranks
        call it together. With dropout its rows are numbered, see `ShardedPlan.with_row_numbers`.
        """
        plan = plan_sharded(
            query_spatial_positions,
            query_batch_offsets,
            pyramid,
            self.neighborhood_sizes,
            query_level_indices,
            group=self._handle.group,
            check_contents=check_contents,
        )
        return plan.with_row_numbers(pyramid) if self._handle.drops else plan

    def _check_plan(
        self, plan: NeighborhoodPlan, inputs: Inputs, check_contents: bool | None
    ) -> None:
        assert isinstance(plan, ShardedPlan)
        own, planned = map(dist.get_process_group_ranks, (self._handle.group, plan.halo.group))
        if own != planned:
            refuse("plan", f"a plan of the ranks {own}", f"one of {planned}")
        if len(inputs.pyramid) != plan.n_own_points:
            expected = f"a plan for {len(inputs.pyramid)} own points"
            refuse("plan", expected, f"one for {plan.n_own_points}")
        known = plan._with_halo(inputs.pyramid)
        super()._check_plan(plan, inputs._replace(pyramid=known), check_contents)

    def _project(
        self, inputs: Inputs, plan: NeighborhoodPlan
    ) -> tuple[Tensor, Tensor, Tensor, Background | None]:
        assert isinstance(plan, ShardedPlan)
        exchange = plan.halo.start(inputs.pyramid.values)
        q, positions = self._project_queries(inputs)  # while the halo is under way
        known = plan._with_halo(inputs.pyramid, exchange.finish())
        k, v = self._heads(known.values, self.kv_proj, 2)
        return q, *self._encode_keys(inputs._replace(pyramid=known), plan, q, positions, k, v)

    def _attend(self, inputs: Inputs, plan: NeighborhoodPlan) -> Tensor:
        assert isinstance(plan, ShardedPlan)
        if not self._handle.interior_first or torch.compiler.is_compiling():
            return super()._attend(inputs, plan)
        exchange = plan.halo.start(inputs.pyramid.values)
        projected = self._project_queries(inputs)
        own = self._heads(inputs.pyramid.values, self.kv_proj, 2)
        seed = draw_seed(self._attention_dropout(), own[0].device)
        interior, boundary = divide_queries(plan, inputs)
        first = self._attend_part(inputs, plan, interior, projected, own, seed)
        received = exchange.finish()[plan.n_own_points :]
        rows = boundary.points[: boundary.n_own]
        halo = self._heads(received, self.kv_proj, 2)
        seen = [torch.cat((take_rows(x, rows), y)) for x, y in zip(own, halo, strict=True)]
        rest = self._attend_part(inputs, plan, boundary, projected, seen, seed)
        order = torch.cat((interior.queries, boundary.queries)).argsort()
        return torch.cat((first, rest)).index_select(0, order)

    def _attend_part(
        self,
        inputs: Inputs,
        plan: ShardedPlan,
        part: QueryPart,
        projected: tuple[Tensor, Tensor],
        points: Sequence[Tensor],
        seed: Tensor | None,
    ) -> Tensor:
        """The attended values ``[m, E]`` of a part's queries.

        Args:
            projected: q and positions of all queries, from `_project_queries`.
            points: k and v of the part's points, not rotated yet.
        """
        inputs = part.select(inputs)
        own = part.plan if seed is None else part.plan_with_ids(plan)
        q, positions = (x.index_select(0, part.queries) for x in projected)
        return self._attend_projected(
            inputs, own, q, *self._encode_keys(inputs, own, q, positions, *points), seed=seed
        )


_SHARDED: dict[type[nn.Module], type[nn.Module]] = {
    SparseNeighborhoodAttentionBlock: ShardedBlock,
    SparseDeformableAttention: ShardedDeformable,
    PointStem: ShardedStem,
    QuerySelection: ShardedSelection,
    Decoder: ShardedDecoder,
    DecoderLayer: ShardedDecoderLayer,
    DenoisingQueryGenerator: ShardedDenoiser,
    SetCriterion: ShardedCriterion,
}


# What ranks send to each other depends on these.
_SETTINGS = "neighborhood_sizes", "attn_drop_rate"


def shard_attention(
    module: ModuleT, group: Group = None, *, interior_first: bool = False
) -> ModuleT:
    """Makes all attention modules in ``module`` attend to the points of all ranks of a group.

    All ranks of the group call it together. It changes the modules in place, and only their
    methods: parameters, hooks and the keys of the state dict stay. Each rank then calls them with
    its own queries and points, all ranks together and equally often, and gets the results of its
    own queries. Call it before DDP or FSDP2 wrap the module.

    Plans are checked by all ranks together, calls of the modules are not: that would cost an
    exchange per layer. So a rank that passes a wrong argument raises alone. If it stops, torch
    raises a RuntimeError on the others, at the latest after the timeout of the group.

    The parts of a detector know more than attention, and it changes them too:

    - `PointStem`: windows see the raw points of all ranks. Cuts between parts of space are to be at
      multiples of its ``strides`` and ``window_strides``.
    - `QuerySelection`: every rank gets the object queries that one process selects. Candidates are
      at the own points; ``chosen`` is -1 where the candidate is one of another rank.
    - `Decoder`: all ranks have all object queries, and get the same predictions. In each
      `DecoderLayer` a rank attends from the queries nearest to its own points, and the results come
      back to all.
    - `DenoisingQueryGenerator`: all ranks have the same noise, drawn by the random number generator
      of the first one. So it is that of one process with the seed of that rank.
    - `SetCriterion`: losses are divided by the objects of all ranks, each counted once. The mean
      over ranks is the loss of one process: DDP and FSDP2 average gradients, and for
      `sum_gradients` the losses are to be divided by the number of ranks. All ranks have all
      targets.

    Attention of other kinds sees the own points only.

    Args:
        module: a module with `SparseNeighborhoodAttentionBlock`, `SparseDeformableAttention` or one
            of these parts in it, such as an encoder or a `Detector`, or one itself. Copies of it
            share the group.
        group: the ranks that share a scene, a process group or a device mesh of one dimension. None
            (default): all ranks.
        interior_first: whether, in `SparseNeighborhoodAttentionBlock`, keys and values of the own
            points are projected and the queries whose windows hold no point of another rank attend
            while the halo is under way. It hides an exchange that takes longer than projecting the
            queries, and costs two more plans, copies of queries and results, and twice as many
            launches. Compiled code does not divide queries. False (default): queries are projected
            meanwhile.

    Returns:
        ``module``.

    Raises:
        ValueError: there is no such module in it, one is sharded already, ``interior_first`` is not
            a bool, or the modules or ``interior_first`` differ between ranks. All ranks raise it.

    Example:
        ```python
        import torch
        import torch.distributed as dist
        from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
        from vicinal.distributed import shard_attention

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        block = shard_attention(SparseNeighborhoodAttentionBlock(8, 2))
        cells = torch.tensor([[0, 9, 9], [0, 3, 4]])  # image, row, column
        pyramid = FeaturePyramid.from_points(cells, torch.randn(2, 8), (16, 16), 1)
        out = block.encode(pyramid)
        dist.destroy_process_group()
        ```
    """
    ranks = as_group(group)
    found = agree(ranks, "shard_attention", lambda: _find_attention(module, interior_first))
    handle = GroupHandle(ranks, _has_dropout(module), interior_first)
    for part, base in found:
        part.__class__ = _sharded_class(type(part), _SHARDED[base])
        vars(part)["_handle"] = handle
    return module


def _find_attention(
    module: nn.Module, interior_first: bool
) -> tuple[list[tuple[nn.Module, type[nn.Module]]], dict[str, Any]]:
    """The attention modules in ``module``, each with the base that is sharded, and what must be the
    same on all ranks.
    """
    check_type("module", module, nn.Module)
    check_type("interior_first", interior_first, bool)
    found: list[tuple[nn.Module, type[nn.Module]]] = []
    facts: dict[str, Any] = {}
    for name, part in module.named_modules():
        for base, sharded in _SHARDED.items():
            if not isinstance(part, base):
                continue
            if isinstance(part, sharded):
                refuse("module", "attention that is not sharded yet", describe(type(part).__name__))
            found.append((part, base))
            shapes = {
                key: (tuple(x.shape), x.dtype, x.requires_grad)
                for key, x in part.named_parameters()
            }
            settings = {key: getattr(part, key, None) for key in _SETTINGS}
            drop_rate = getattr(getattr(part, "dropout", None), "p", None)
            facts[f"module {name}"] = type(part).__name__, settings, drop_rate, shapes
    if not found:
        names = ", ".join(base.__name__ for base in _SHARDED)
        refuse("module", f"a module with {names} in it", describe(type(module).__name__))
    return found, {
        "attention modules": list(facts),
        "module dropout": _has_dropout(module),
        "interior_first": interior_first,
        **facts,
    }


def _has_dropout(module: nn.Module) -> bool:
    """Whether some part of ``module`` has dropout in training."""
    return any(
        (isinstance(part, nn.Dropout) and part.p > 0) or getattr(part, "attn_drop_rate", 0) > 0
        for part in module.modules()
    )


@cached
def _sharded_class(own: type[nn.Module], sharded: type[nn.Module]) -> type[nn.Module]:
    """``sharded``, or its combination with a subclass of a user."""
    if own in _SHARDED:
        return sharded
    return type(f"Sharded{own.__name__}", (sharded, own), {"__module__": own.__module__})


def sum_gradients(parameters: Iterable[Tensor], group: Group = None) -> None:
    """Adds up the gradients of parameters that every rank of a group has, in place.

    For parameters and for inputs that all ranks hold, such as a background, each rank computes the
    part of the gradient that comes from its own queries. The whole gradient is the sum. DDP and
    FSDP2 average over ranks in its place; see the pitfalls in the documentation.

    Args:
        parameters: those of a module, or other tensors, the same on all ranks. Where a rank has no
            gradient, it counts as zero. Those that require none are left out.
        group: as for `shard_attention`.

    Raises:
        ValueError: ``parameters`` is a tensor, or holds something else, or they differ between
            ranks. All ranks raise it.

    Example:
        ```python
        import torch
        import torch.distributed as dist
        from vicinal.distributed import sum_gradients

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        weight = torch.ones(3, requires_grad=True)
        weight.sum().backward()
        sum_gradients([weight])
        dist.destroy_process_group()
        ```
    """
    ranks = as_group(group)
    for leaves in agree(ranks, "sum_gradients", lambda: _leaves_by_kind(parameters)):
        for leaf in leaves:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        joined = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(joined, group=ranks)
        parts = joined.split([grad.numel() for grad in grads])
        for grad, part in zip(grads, parts, strict=True):
            grad.copy_(part.view_as(grad))


def _leaves_by_kind(parameters: Any) -> tuple[list[list[Tensor]], dict[str, Any]]:
    """The tensors that require gradients, those of a dtype and device together, and what must be
    the same on all ranks.
    """
    leaves: list[Any] = list(parameters) if isinstance(parameters, Iterable) else [None]
    if isinstance(parameters, Tensor) or not all(isinstance(leaf, Tensor) for leaf in leaves):
        refuse("parameters", "an iterable of tensors, such as module.parameters()", parameters)
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for leaf in leaves:
        if leaf.requires_grad:
            kinds.setdefault((leaf.dtype, leaf.device), []).append(leaf)
    shapes = [(leaf.dtype, tuple(leaf.shape)) for leaves in kinds.values() for leaf in leaves]
    return list(kinds.values()), {"parameters": shapes}
