"""Rows of tensors sent between ranks, with gradients that travel back."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Counts = tuple[int, ...]  # of rows, one per rank
# The dtypes that all back ends send; others travel as bytes.
_SENT = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64}


def send_rows(rows: Tensor, send: Counts, receive: Counts, group: ProcessGroup) -> Tensor:
    """The rows ``[sum(receive), ...]`` that come in, rank by rank, for ``rows``
    ``[sum(send), ...]`` that go out. Without gradients.
    """
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    exchange(received, rows.contiguous(), send, receive, group)
    return received


def exchange(
    received: Tensor,
    rows: Tensor,
    send: Counts,
    receive: Counts,
    group: ProcessGroup,
    *,
    async_op: bool = False,
) -> Any:
    """Fills ``received`` with the rows that come in for ``rows``, both contiguous. Returns what
    waits for it, if ``async_op``.
    """
    if rows.dtype not in _SENT:
        received, rows = _as_bytes(received), _as_bytes(rows)
    sizes = list(receive), list(send)
    return dist.all_to_all_single(received, rows, *sizes, group=group, async_op=async_op)


def _as_bytes(rows: Tensor) -> Tensor:
    """``rows`` ``[n, ...]`` as uint8 ``[n, bytes]``, a view."""
    return rows.view(len(rows), math.prod(rows.shape[1:]), 1).view(torch.uint8).flatten(1)


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
        extended, _ = _append(x, halo)
        return extended

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
        return _fold(x[:n], send_rows(x[n:], halo.receive, halo.send, halo.group), halo)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient of ``x``."""
        return AppendHalo.apply(grads[0], ctx.halo), None


class Flight:
    """Rows that are under way: what waits for them, and the tensors that they need until then."""

    def __init__(self) -> None:
        self.work: Any = None
        self.rows: Tensor | None = None

    def wait(self) -> Tensor | None:
        """Waits for the rows. On a GPU only its current stream does."""
        if self.work is not None:
            self.work.wait()
        rows, self.work, self.rows = self.rows, None, None
        return rows


class StartHalo(torch.autograd.Function):
    """`AppendHalo` whose rows `FinishHalo` waits for. In between they are not there yet.

    Autograd runs what was done last first: `FinishHalo` starts to send gradients, and this function
    waits for them, when all has run that was done in between.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, halo: Any, flight: Flight) -> Tensor:
        """``[n, ...]`` to ``[n + R, ...]``."""
        ctx.halo, ctx.flight = halo, flight
        extended, flight.rows = _append(x, halo, flight)
        return extended

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of ``x``."""
        (grad,), halo = grads, ctx.halo
        returned = ctx.flight.wait()
        if returned is None:  # gradients of gradients: nothing was started
            return FoldHalo.apply(grad, halo), None, None
        return _fold(grad[: grad.shape[0] - sum(halo.receive)], returned, halo), None, None


class FinishHalo(torch.autograd.Function):
    """Waits for the rows that `StartHalo` asked for."""

    @staticmethod
    def forward(ctx: Any, extended: Tensor, halo: Any, flight: Flight) -> Tensor:
        """``extended``, with the rows of the halo."""
        ctx.halo, ctx.flight = halo, flight
        flight.wait()
        ctx.mark_dirty(extended)
        return extended

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The same gradient, of which the halo's rows begin to return to their owners."""
        (grad,), halo, flight = grads, ctx.halo, ctx.flight
        if not torch.is_grad_enabled():
            rows = grad[grad.shape[0] - sum(halo.receive) :].contiguous()
            flight.rows = rows.new_empty(sum(halo.send), *rows.shape[1:])
            counts = halo.receive, halo.send
            flight.work = exchange(flight.rows, rows, *counts, halo.group, async_op=True)
        return grad, None, None


def _append(x: Tensor, halo: Any, flight: Flight | None = None) -> tuple[Tensor, Tensor]:
    """``x`` ``[n, ...]`` with the rows of a halo, and the rows that were sent. With a ``flight``
    they are under way.
    """
    n = x.shape[0]
    extended = x.new_empty(n + sum(halo.receive), *x.shape[1:])
    sent = x.index_select(0, halo.rows)
    counts = halo.send, halo.receive
    work = exchange(extended[n:], sent, *counts, halo.group, async_op=flight is not None)
    if flight is not None:
        flight.work = work
    extended[:n] = x
    return extended, sent


def _fold(own: Tensor, returned: Tensor, halo: Any) -> Tensor:
    """``own`` ``[n, ...]`` plus what other ranks returned of the rows that they were sent.

    Rank by rank, each of whose rows are unique, so that sums have the same bits every time.
    """
    total = own.clone()
    for rows, part in zip(halo.rows.split(halo.send), returned.split(halo.send), strict=True):
        total.index_add_(0, rows, part)
    return total


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
        return SumRows.apply(grads[0], ctx.counts, ctx.group), None, None


class SumRows(torch.autograd.Function):
    """The own rows of the sum over ranks: the adjoint of `AllRows`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Counts, group: ProcessGroup) -> Tensor:
        """``[sum(counts), ...]`` to ``[counts[rank], ...]``."""
        ctx.counts, ctx.group = counts, group
        total = rows.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        own: Tensor = total.split(counts)[dist.get_rank(group)]
        return own.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of ``rows``."""
        return AllRows.apply(grads[0], ctx.counts, ctx.group), None, None
