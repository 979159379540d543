"""PyTorch Geometric: the attention of its graph transformer over an edge list.

Shi et al., "Masked Label Prediction: Unified Message Passing Model for Semi-Supervised
Classification" (2021), without its projections: they are the block's own here.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor

from benchmarks.layer import Attend, Layer
from benchmarks.peers.contest import Contest
from benchmarks.work import Work


def problem(layer: Layer) -> str | None:
    if importlib.util.find_spec("torch_geometric") is None:
        return "torch_geometric is not installed"
    return None


def prepare(layer: Layer) -> Contest:
    ours = layer.attention()
    q, _, _ = ours.inputs
    attend = attention(layer.plan.pairs(), *q.shape[1:])
    return Contest(Work(attend, ours.inputs), ours)


def attention(pairs: Tensor, heads: int, width: int) -> Attend:
    """Attention over ``pairs`` [M, 2] of query and point, by heads of a width."""
    from torch_geometric.nn import TransformerConv

    edges = pairs.flip(1).t().contiguous()  # from the point to the query
    # Its projections are never called; the head width is all it takes from its arguments.
    layer = TransformerConv(1, width, heads, root_weight=False, bias=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = layer.propagate(
            edges, query=q, key=k, value=v, edge_attr=None, size=(len(k), len(q))
        )
        return out

    return attend
