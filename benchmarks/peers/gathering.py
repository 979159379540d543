"""Gather the cells around every query and project each of them; see `gather_and_project`."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.gather_and_project import GatherAndProjectBlock
from benchmarks.layer import Layer
from benchmarks.peers.contest import Contest
from benchmarks.work import Work


def problem(layer: Layer) -> str | None:
    return None


def prepare(layer: Layer) -> Contest:
    """The whole block, on a sparse COO map, which is what this peer understands."""
    peer = layer.make_block(GatherAndProjectBlock, *layer.sizes).to(layer.x)
    peer.load_state_dict(layer.block.state_dict())
    return Contest(
        Work(layer.on_sparse_map(peer), (layer.x,), _parameters(peer)),
        Work(layer.on_sparse_map(layer.block), (layer.x,), _parameters(layer.block)),
    )


def _parameters(block: nn.Module) -> tuple[Tensor, ...]:
    """In the order of their names, as the two blocks hold them in different orders."""
    named = dict(block.named_parameters())
    return tuple(named[name] for name in sorted(named))
