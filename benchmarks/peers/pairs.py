"""Plain PyTorch with one row per pair: the first thing that comes to mind, without the gathering.

It is given the pairs, which is what the library calls a plan.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.layer import Attend, Layer
from benchmarks.peers.contest import Contest
from benchmarks.work import Work


def problem(layer: Layer) -> str | None:
    return None


def prepare(layer: Layer) -> Contest:
    """The attention alone."""
    ours = layer.attention()
    return Contest(Work(attention(layer.plan.pairs()), ours.inputs), ours)


def prepare_block(layer: Layer) -> Contest:
    """The whole block. The peer is given the pairs, the library plans: that favours the peer."""
    theirs = layer.with_dtype(layer.x.dtype, backend="reference")  # rotation in plain PyTorch too
    attend = attention(layer.plan.pairs())
    return Contest(
        Work(theirs.around(attend), (layer.x,), tuple(theirs.block.parameters())), layer.whole()
    )


def attention(pairs: Tensor) -> Attend:
    """Attention over ``pairs`` [M, 2] of query and point."""
    query, point = pairs.t().contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        products = q.index_select(0, query) * k.index_select(0, point)
        logits = products.sum(-1) * q.shape[-1] ** -0.5  # [M, H]
        del products
        top = logits.new_zeros(q.shape[:2]).scatter_reduce(
            0, query[:, None].expand_as(logits), logits.detach(), "amax", include_self=False
        )
        exponentials = (logits - top.index_select(0, query)).exp()
        total = torch.zeros_like(top).index_add(0, query, exponentials)
        weights = exponentials / total.index_select(0, query)
        weighted = weights[..., None] * v.index_select(0, point)
        return v.new_zeros(len(q), *v.shape[1:]).index_add(0, query, weighted)

    return attend
