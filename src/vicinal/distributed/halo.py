"""The halo: what a rank sees of the points of others."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._utils.checks import as_integers, as_tensor, check_tensor, refuse
from .exchange import AppendHalo, Counts, FinishHalo, Flight, StartHalo
from .groups import SharesGroup, as_group, ranks_of


@dataclass(frozen=True, eq=False)
class Halo(SharesGroup):
    """Which rows of a tensor per point other ranks see, and how many rows come from them.

    `plan_sharded` finds it. A row is sent once per rank, however many of its queries see it.

    Attributes:
        rows: int64 ``[S]``, the own rows that are sent, those for rank 0 first.
        send: how many of them each rank gets.
        receive: how many rows each rank sends to this one, R in all.
        group: the ranks.

    Example:
        ```python
        import torch
        import torch.distributed as dist
        from vicinal.distributed import Halo

        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        halo = Halo(torch.tensor([2]), send=(1,), receive=(1,), group=dist.group.WORLD)
        x = torch.tensor([[1.0], [2.0], [3.0]])
        assert halo.extend(x).flatten().tolist() == [1, 2, 3, 3]
        dist.destroy_process_group()
        ```
    """

    rows: Tensor
    send: Counts
    receive: Counts
    group: ProcessGroup

    def __post_init__(self) -> None:
        check_tensor("rows", self.rows, ("S",), kind="integer")
        n_ranks = ranks_of(as_group(self.group))[1]
        for name, counts in (("send", self.send), ("receive", self.receive)):
            numbers = as_integers(counts)
            if numbers is None or len(numbers) != n_ranks or min(numbers) < 0:
                refuse(name, f"a number of rows for each of {n_ranks} ranks", counts)
        if sum(self.send) != len(self.rows):
            refuse("send", f"{len(self.rows)} rows in all, as in rows", self.send)

    def extend(self, x: Tensor) -> Tensor:
        """Returns ``x`` ``[n, ...]`` with the rows of other ranks appended, ``[n + R, ...]``.

        All ranks of the group call it together. The gradient of a row is the own one plus those of
        the ranks that it was sent to, in the order of ranks: the same bits on every run. So ``x``
        requires a gradient on all ranks or on none.

        Raises:
            ValueError: ``x`` is not a dense tensor on the device of the halo. Only this rank raises
                it.
        """
        return self.start(x).finish()

    def start(self, x: Tensor) -> "HaloExchange":
        """Begins `extend`, and returns before the rows of other ranks have come.

        What is computed until `HaloExchange.finish` does not wait for them. In the backward pass,
        gradients travel while those of what was computed in between are found. Compiled code does
        all at once.

        Raises:
            ValueError: as `extend` does.
        """
        x = as_tensor("x", x, self.rows.device)
        is_tensor = isinstance(x, Tensor) and x.layout == torch.strided and x.dim() > 0
        if not is_tensor or x.device != self.rows.device:
            refuse("x", f"a tensor with a row per point on {self.rows.device}", x)
        if torch.compiler.is_compiling():
            return HaloExchange(AppendHalo.apply(x, self), self, None)
        flight = Flight()
        return HaloExchange(StartHalo.apply(x, self, flight), self, flight)

    def to(self, device: torch.device | str) -> "Halo":
        """Returns the same halo on another device."""
        return Halo(self.rows.to(device), self.send, self.receive, self.group)


@dataclass(eq=False)
class HaloExchange:
    """Rows that are under way between ranks. `Halo.start` returns it.

    Example:
        ```python
        import torch
        import torch.distributed as dist
        from vicinal.distributed import Halo

        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        halo = Halo(torch.tensor([2]), send=(1,), receive=(1,), group=dist.group.WORLD)
        x = torch.tensor([[1.0], [2.0], [3.0]])
        exchange = halo.start(x)
        mean = x.mean()  # of the own rows
        assert exchange.finish().flatten().tolist() == [1, 2, 3, 3]
        dist.destroy_process_group()
        ```
    """

    _extended: Tensor
    _halo: Halo
    _flight: Flight | None

    def finish(self) -> Tensor:
        """Waits for the rows of other ranks and returns what `Halo.extend` does. All ranks call it
        once.
        """
        if self._flight is None:
            return self._extended
        finished: Tensor = FinishHalo.apply(self._extended, self._halo, self._flight)
        return finished
