"""Chunks of rows whose intermediate tensors stay in the caches, their results, and sums over them.

Sums over rows are taken chunk by chunk, in order. `Tensor.sum` gives each thread whole columns, so
neither depends on the number of threads.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CHUNK = 2**21  # bytes of x that fit the level-2 cache beside a result

torch.library.define("vicinal::new_rows", "(Tensor like, int n_rows, int n_columns) -> Tensor")


# Without the compiled kernel of the CPU back end.
@torch.library.impl("vicinal::new_rows", "CompositeExplicitAutograd")
@torch.library.register_fake("vicinal::new_rows")
def _(like: Tensor, n_rows: int, n_columns: int) -> Tensor:
    return like.new_empty(n_rows, n_columns)


def new_rows(like: Tensor, n_rows: int, n_columns: int) -> Tensor:
    """An uninitialized tensor in the dtype of ``like``, in large pages if it is large: the system
    takes longer to hand out small ones than the chunks take to be computed.
    """
    made: Tensor = torch.ops.vicinal.new_rows(like, n_rows, n_columns)
    return made


def chunk_rows(x: Tensor) -> int:
    """The number of rows of a chunk. It does not depend on the number of threads, else the order of
    sums, and so the bits, would.

    Chunks of wide rows exceed `_CHUNK`, so that reading the weights once a chunk costs little.
    """
    width = x.shape[1]
    return max(1, _CHUNK // max(1, width * x.element_size()), 2 * width)


def row_chunks(x: Tensor) -> Iterator[slice]:
    """The chunks of rows, at least one, which is empty if ``x`` is."""
    step = chunk_rows(x)
    return (slice(start, start + step) for start in range(0, max(len(x), 1), step))


def add_terms(sums: list[Tensor], terms: Sequence[Tensor]) -> None:
    """Adds the terms of a chunk to the sums over chunks, in float32 or float64."""
    if not sums:
        sums += [term.to(torch.promote_types(term.dtype, torch.float32)) for term in terms]
        return
    for total, term in zip(sums, terms, strict=True):
        total += term


def rounded(sums: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The sums in ``dtype``."""
    return [total.to(dtype) for total in sums]
