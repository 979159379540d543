"""Scenes that no one device holds: every rank owns a part of space, its points and its queries.

What the windows of its queries reach of the parts of others, the halo, comes from their owners, and
gradients travel back the same way.
"""

from .halo import Halo, HaloExchange
from .modules import shard_attention, sum_gradients
from .partition import SpacePartition, partition_space
from .plan import ShardedPlan, plan_sharded
from .route import Route

__all__ = [
    "Halo",
    "HaloExchange",
    "Route",
    "ShardedPlan",
    "SpacePartition",
    "partition_space",
    "plan_sharded",
    "shard_attention",
    "sum_gradients",
]
