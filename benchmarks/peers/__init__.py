"""Other ways to the same end, one small file each.

A peer says in `problem` why it cannot run here, and in `prepare` sets up its own call and the
library's for the same work. Packages it needs are imported only then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.layer import Layer
from benchmarks.peers import deformable, dense, edges, flex, gathering, pairs
from benchmarks.peers.contest import Contest


class Peer(NamedTuple):
    label: str
    problem: Callable[[Layer], str | None]
    """Why it cannot run on that layer here, or None."""
    prepare: Callable[[Layer], Contest]


PEERS = {
    "gathering": Peer("gather and project, whole block", gathering.problem, gathering.prepare),
    "pairs": Peer("plain PyTorch, a row per pair", pairs.problem, pairs.prepare),
    "pairs-block": Peer("plain PyTorch pairs, whole block", pairs.problem, pairs.prepare_block),
    "edges": Peer("PyTorch Geometric, edge list", edges.problem, edges.prepare),
    "flex": Peer("FlexAttention, points as stored", flex.problem, flex.prepare),
    "flex-sorted": Peer("FlexAttention, points along a curve", flex.problem, flex.prepare_sorted),
    "dense": Peer("NATTEN on the densified map", dense.problem, dense.prepare),
    "deformable": Peer("deformable attention, equal keys", deformable.problem, deformable.prepare),
}
