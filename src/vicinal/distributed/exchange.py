"""Rows of tensors sent between ranks, with gradients that travel back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Counts = tuple[int, ...]  # of rows, one per rank


def send_rows(rows: Tensor, send: Counts, receive: Counts, group: ProcessGroup) -> Tensor:
    """The rows ``[sum(receive), ...]`` that come in, rank by rank, for ``rows``
    ``[sum(send), ...]`` that go out. Without gradients.
    """
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=group)
    return received


class MoveRows(torch.autograd.Function):
    """Sends every row to one rank. Gradients go back the same way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: Counts, receive: Counts, group: ProcessGroup
    ) -> Tensor:
        """``[sum(send), ...]`` to ``[sum(receive), ...]``, rank by rank."""
        ctx.way = receive, send, group
        return send_rows(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of ``rows``."""
        return MoveRows.apply(grads[0], *ctx.way), None, None, None


class AppendHalo(torch.autograd.Function):
    """Appends the rows of other ranks that a `Halo` names to the own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, halo: Any) -> Tensor:
        """``[n, ...]`` to ``[n + R, ...]``."""
        ctx.halo = halo
        n = x.shape[0]
        out = x.new_empty(n + sum(halo.receive), *x.shape[1:])
        out[:n] = x
        sent = x.index_select(0, halo.rows)
        sizes = list(halo.receive), list(halo.send)
        dist.all_to_all_single(out[n:], sent, *sizes, group=halo.group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient of ``x``."""
        return FoldHalo.apply(grads[0], ctx.halo), None


class FoldHalo(torch.autograd.Function):
    """Adds the rows of a halo to those that they are copies of, on the ranks that own them: the
    adjoint of `AppendHalo`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, halo: Any) -> Tensor:
        """``[n + R, ...]`` to ``[n, ...]``."""
        ctx.halo = halo
        n = x.shape[0] - sum(halo.receive)
        returned = send_rows(x[n:], halo.receive, halo.send, halo.group)
        own = x[:n].clone()
        # Rank by rank, each of whose rows are unique, so that sums have the same bits every time.
        for rows, part in zip(halo.rows.split(halo.send), returned.split(halo.send), strict=True):
            own.index_add_(0, rows, part)
        return own

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient of ``x``."""
        return AppendHalo.apply(grads[0], ctx.halo), None


class AllRows(torch.autograd.Function):
    """The rows of all ranks on every rank. The gradient of a row is the sum of those that all ranks
    give it.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Counts, group: ProcessGroup) -> Tensor:
        """``[counts[rank], ...]`` to ``[sum(counts), ...]``, rank by rank."""
        ctx.counts, ctx.group = counts, group
        # Gathered with as many rows from every rank, since not all back ends take uneven ones.
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of ``rows``."""
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        own = total.split(ctx.counts)[dist.get_rank(ctx.group)]
        return own.clone(), None, None
