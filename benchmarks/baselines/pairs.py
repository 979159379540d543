"""Attention with one row per pair of a query and a neighbor; the pairs are given.

In plain PyTorch, and by the graph transformer of PyTorch Geometric: Shi et al., "Masked Label
Prediction: Unified Message Passing Model for Semi-Supervised Classification" (2021).
"""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.baselines.comparison import Comparison
from benchmarks.layer import Attend, Layer
from benchmarks.measure import Work
from benchmarks.outcome import require


def prepare(layer: Layer) -> Comparison:
    """The attention alone."""
    vicinal = layer.attention()
    return Comparison(Work(_attention(layer.plan.pairs()), vicinal.inputs), vicinal)


def prepare_block(layer: Layer) -> Comparison:
    """The whole block. Pairs are given, but the library plans: that favors the baseline."""
    plain = replace(layer, backend="reference")  # rotation in plain PyTorch too
    attend = plain.around(_attention(layer.plan.pairs()))
    return Comparison(Work(attend, (layer.x,), tuple(plain.block.parameters())), layer.whole())


def prepare_edges(layer: Layer) -> Comparison:
    """PyTorch Geometric: the attention alone, with the block's own projections."""
    require("torch_geometric")
    from torch_geometric.nn import TransformerConv

    vicinal = layer.attention()
    _, heads, width = vicinal.inputs[0].shape
    edges = layer.plan.pairs().flip(1).t().contiguous()  # [2, M], from the point to the query
    # Its projections are never called; of its arguments, only heads and their width matter.
    convolution = TransformerConv(1, width, heads, root_weight=False, bias=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given, size = {"query": q, "key": k, "value": v}, (len(k), len(q))
        out: Tensor = convolution.propagate(edges, **given, edge_attr=None, size=size)
        return out

    return Comparison(Work(attend, vicinal.inputs), vicinal)


def _attention(pairs: Tensor) -> Attend:
    """Attention over ``pairs`` [M, 2] of query and point."""
    query, point = pairs.t().contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        products = q.index_select(0, query) * k.index_select(0, point)
        logits = products.sum(-1) * q.shape[-1] ** -0.5  # [M, H]
        del products
        row_max = logits.new_zeros(q.shape[:2]).scatter_reduce(
            0, query[:, None].expand_as(logits), logits.detach(), "amax", include_self=False
        )
        exponentials = (logits - row_max.index_select(0, query)).exp()
        row_sum = torch.zeros_like(row_max).index_add(0, query, exponentials)
        weights = exponentials / row_sum.index_select(0, query)
        weighted = weights[..., None] * v.index_select(0, point)
        return v.new_zeros(len(q), *v.shape[1:]).index_add(0, query, weighted)

    return attend
