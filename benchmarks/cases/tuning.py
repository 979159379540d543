"""The tuning of the Triton kernels: rows of a tile, columns of a block and warps.

The library chooses them by shape and offers no setting, so this module replaces private functions.
"""

import itertools
from collections.abc import Sequence
from unittest import mock

from benchmarks.layer import Layer
from benchmarks.measure import kernel_seconds
from benchmarks.outcome import Figures

KERNELS = {"attend", "query_gradients", "point_gradients"}


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
        own = {"BLOCK": block}
        with (
            mock.patch.object(launch, "_constants", lambda *a, own=own: {**chosen(*a), **own}),
            mock.patch.object(launch, "_n_warps", return_value=n_warps),
        ):
            try:
                attention = layer.attention()
                calls = {"forward": attention.forward, "backward": attention.backward()}
                timings = layer.time(calls, repeats)
                of_kernels: dict[str, float] = {}
                for call in calls.values():
                    of_kernels |= kernel_seconds(call, repeats, layer.device)
            except Exception as error:  # whatever compilers and drivers raise
                figures[f"problem {setting}"] = f"{type(error).__name__}: {error}"[:200]
            else:
                figures |= {f"{name}_seconds {setting}": timings.median(name) for name in calls}
                for name in KERNELS & of_kernels.keys():
                    figures[f"{name}_seconds {setting}"] = of_kernels[name]
    return figures
