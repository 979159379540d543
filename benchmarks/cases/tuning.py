"""The tuning of the Triton kernels: rows of a tile, columns of a block and warps.

The library chooses them by shape and offers no setting, so this module replaces private functions.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from torch import Tensor

from benchmarks.layer import Layer
from benchmarks.measure import time_calls
from benchmarks.outcome import Figures

Constants = Callable[[Tensor, Tensor], dict[str, Any]]


def sweep(
    layer: Layer, repeats: int, blocks: Sequence[int], warps: Sequence[int], rows: int
) -> Figures:
    """Times of the attention's passes by tiles of ``rows``, for each of the blocks and warps.

    A setting that does not fit on the GPU has its problem instead.
    """
    # Late: Triton asks first who runs the kernels, and other commits may lack these modules.
    from vicinal._index import tiles
    from vicinal.backends.triton import launch

    chosen, figures = launch._constants, layer.figures
    with mock.patch.object(tiles, "tile_rows", return_value=rows):
        layer.plan = layer.make_plan()
        layer.attention().step()  # finds the tiles, which stay with the plan
    for block, n_warps in itertools.product(blocks, warps):
        setting = f"{block}x{n_warps}"
        with mock.patch.object(launch, "_constants", _with(chosen, BLOCK=block, num_warps=n_warps)):
            try:
                attention = layer.attention()
                calls = (attention.forward, attention.backward())
                timings = time_calls(*calls, repeats=repeats, device=layer.device)
            except Exception as error:  # whatever compilers and drivers raise
                figures[f"problem {setting}"] = f"{type(error).__name__}: {error}"[:200]
            else:
                figures[f"forward_seconds {setting}"] = timings.median(0)
                figures[f"backward_seconds {setting}"] = timings.median(1)
    return figures


def _with(chosen: Constants, **others: int) -> Constants:
    return lambda k, v: chosen(k, v) | others
