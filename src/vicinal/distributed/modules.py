"""Attention modules of which every rank has its own queries and points."""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._utils.caching import cached
from .._utils.checks import check_type, describe, refuse
from ..attention import Background
from ..nn._base import Inputs
from ..nn.block import SparseNeighborhoodAttentionBlock
from ..plan import NeighborhoodPlan
from ..pyramid import FeaturePyramid
from .groups import Group, GroupHandle, as_group
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
        drops = self.attn_drop_rate > 0 or getattr(self.dropout, "p", 0) > 0
        return plan.with_row_numbers(pyramid) if drops else plan

    def _check_plan(
        self, plan: NeighborhoodPlan, inputs: Inputs, check_contents: bool | None
    ) -> None:
        assert isinstance(plan, ShardedPlan)
        if len(inputs.pyramid) != plan.n_own_points:
            expected = f"a plan for {len(inputs.pyramid)} own points"
            refuse("plan", expected, f"one for {plan.n_own_points}")
        known = plan._with_halo(inputs.pyramid)
        super()._check_plan(plan, inputs._replace(pyramid=known), check_contents)

    def _project(
        self, inputs: Inputs, plan: NeighborhoodPlan
    ) -> tuple[Tensor, Tensor, Tensor, Background | None]:
        assert isinstance(plan, ShardedPlan)
        return super()._project(inputs._replace(pyramid=plan.extend(inputs.pyramid)), plan)


_SHARDED: dict[type[nn.Module], type[nn.Module]] = {
    SparseNeighborhoodAttentionBlock: ShardedBlock,
}


def shard_attention(module: ModuleT, group: Group = None) -> ModuleT:
    """Makes all attention modules in ``module`` attend to the points of all ranks of a group.

    It changes the modules in place, and only their methods: parameters, hooks and the keys of the
    state dict stay. Each rank then calls them with its own queries and points, all ranks together
    and equally often, and gets the results of its own queries. Call it before DDP or FSDP2 wrap the
    module.

    Args:
        module: a module with `SparseNeighborhoodAttentionBlock` in it, such as an encoder, or one
            itself. Copies of it share the group.
        group: the ranks that share a scene, a process group or a device mesh of one dimension. None
            (default): all ranks.

    Returns:
        ``module``.

    Raises:
        ValueError: there is no attention module in it, or one is sharded already.

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
    check_type("module", module, nn.Module)
    handle = GroupHandle(as_group(group))
    found = [
        (part, base) for part in module.modules() for base in _SHARDED if isinstance(part, base)
    ]
    if not found:
        names = ", ".join(base.__name__ for base in _SHARDED)
        refuse("module", f"a module with {names} in it", describe(type(module).__name__))
    for part, base in found:
        if isinstance(part, _SHARDED[base]):
            refuse("module", "attention that is not sharded yet", describe(type(part).__name__))
    for part, base in found:
        part.__class__ = _sharded_class(type(part), _SHARDED[base])
        vars(part)["_handle"] = handle
    return module


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
        parameters: the same on all ranks. Where a rank has no gradient, it counts as zero.
        group: as for `shard_attention`.

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
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=ranks)
