"""Dropout of rows of channels whose mask does not depend on which rows are there."""

import torch
from torch import Tensor, nn

from .._utils.checks import check_tensor
from .._utils.random import keep_elements, keep_elements_in_place
from ..backends.transforms import transforms_active


class RowDropout(nn.Dropout):
    """Zeroes elements of rows ``[n, E]`` in training and divides the others by ``1 - p``.

    It is `torch.nn.Dropout` (Srivastava et al., "Dropout", 2014) with another source of random
    bits. Whether an element is kept is a hash of a seed, the id of its row and its channel (a
    counter-based generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    So a process that holds some of the rows finds the mask that one process with all of them finds,
    given the same seed. Each call draws the seed from torch's generator of the device.

    Args:
        p: probability of zeroing an element, in [0, 1]. Default: 0.5. With 0 and in eval mode,
            `forward` returns its argument and draws no random number.

    Raises:
        ValueError: ``p`` is outside [0, 1].

    Example:
        ```python
        import torch
        from vicinal.nn import RowDropout

        dropout, x, rows = RowDropout(0.5), torch.ones(6, 8), torch.arange(6)
        torch.manual_seed(0)
        whole = dropout(x)
        torch.manual_seed(0)
        assert torch.equal(dropout(x[4:], rows[4:]), whole[4:])
        ```
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def forward(self, x: Tensor, row_ids: Tensor | None = None) -> Tensor:
        """Returns ``x`` after dropout.

        Args:
            x: floating ``[n, E]``.
            row_ids: integer ``[n]``, of which the lowest 32 bits count. None (default): the rows
                0 to n - 1 on the CPU. Elsewhere the mask is then that of `torch.nn.Dropout`, which
                takes fewer launches.

        Returns:
            ``[n, E]`` in the dtype of ``x``.

        Raises:
            ValueError: shapes, dtypes or devices do not match.
        """
        if self.p == 0 or not self.training:
            return x
        x = check_tensor("x", x, ("n", "E"), kind="floating")
        n_rows, width = x.shape
        if row_ids is not None:
            ids = check_tensor("row_ids", row_ids, (n_rows,), kind="integer", device=x.device)
        elif x.device.type == "cpu":
            ids = torch.arange(n_rows, device=x.device)
        else:
            return super().forward(x)
        if self.p == 1:
            return super().forward(x)
        seed = torch.randint(2**62, (), device=x.device)
        one_by_one = not (torch.compiler.is_compiling() or transforms_active())
        keep = (keep_elements_in_place if one_by_one else keep_elements)(seed, ids, width, self.p)
        return torch.where(keep, x, 0).mul_(1 / (1 - self.p))
