"""Routes: rows that travel to the ranks that own them, and back."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._utils.checks import as_tensor, refuse
from ..placement import QueryPlacement
from .exchange import Counts, MoveRows
from .groups import SharesGroup


@dataclass(frozen=True, eq=False)
class Route(SharesGroup):
    """Where the rows of this rank go, and in which order those of others arrive.

    `SpacePartition.route` makes one. All ranks of the group call its methods together.

    Attributes:
        order: int64 ``[n]``, the own rows by the rank that they go to.
        send: how many rows go to each rank.
        receive: how many rows come from each rank, m in all.
        sorting: int64 ``[m]``, the order of the rows that arrived, which come rank by rank.
        group: the ranks.
        placement: where the queries that arrived are, for a route of queries; else None.

    Example:
        ```python
        import torch
        import torch.distributed as dist
        from vicinal.distributed import partition_space

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        cells = torch.tensor([[0, 9, 9], [0, 3, 4]])  # image, row, column
        route = partition_space(cells, (16, 16)).route(cells)
        moved = route.scatter(torch.tensor([[1.0], [2.0]]))
        assert route.gather(moved).flatten().tolist() == [1, 2]
        dist.destroy_process_group()
        ```
    """

    order: Tensor
    send: Counts
    receive: Counts
    sorting: Tensor
    group: ProcessGroup
    placement: QueryPlacement | None = None

    def scatter(self, x: Tensor) -> Tensor:
        """Returns the rows ``[m, ...]`` that this rank owns, of the rows ``x`` ``[n, ...]`` of all
        ranks. Gradients travel back: ``x`` requires one on all ranks or on none.

        Raises:
            ValueError: ``x`` does not have a row for each of the n rows. Only this rank raises it.
        """
        x = self._check(x, len(self.order))
        moved: Tensor = MoveRows.apply(x[self.order], self.send, self.receive, self.group)
        return moved[self.sorting]

    def gather(self, x: Tensor) -> Tensor:
        """Returns ``x`` ``[m, ...]`` to the ranks that the rows came from, ``[n, ...]`` in their
        order: the inverse of `scatter`.

        Raises:
            ValueError: ``x`` does not have a row for each of the m rows. Only this rank raises it.
        """
        x = self._check(x, len(self.sorting))[self.sorting.argsort()]
        moved: Tensor = MoveRows.apply(x, self.receive, self.send, self.group)
        return moved[self.order.argsort()]

    def _check(self, x: Tensor, n: int) -> Tensor:
        x = as_tensor("x", x, self.order.device)
        is_tensor = isinstance(x, Tensor) and x.layout == torch.strided
        if not is_tensor or x.shape[:1] != (n,) or x.device != self.order.device:
            refuse("x", f"a tensor of {n} rows on {self.order.device}", x)
        return x
