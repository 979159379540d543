"""What the kernels are tuned by: tiles, blocks and warps, and tiles for a few scattered queries."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.meter import clock_of, replayed
from benchmarks.gpu.tiling import choosing, chosen_rows, point_tiles, query_tiles
from benchmarks.layer import Layer
from benchmarks.measure import Call
from benchmarks.outcome import Figures
from benchmarks.work import Work
from vicinal import NeighborhoodPlan, plan_neighborhoods

ROWS = (1, 16)
"""Of a tile of scattered queries: each for itself, or as neighbors would be taken."""


def sweep(
    layer: Layer, rows: int, blocks: Sequence[int], warps: Sequence[int], repeats: int
) -> Figures:
    """Times of the attention's passes by tiles of ``rows``, for each of the blocks and warps.

    A setting that does not fit on the GPU has its problem instead.
    """
    with choosing(lambda n_rows, n_others: rows):
        n_tiles = len(query_tiles(layer.plan).firsts)
        point_tiles(layer.plan)
    figures: Figures = {"points": len(layer), "tiles": n_tiles}
    for block, n_warps in itertools.product(blocks, warps):
        setting = f"{block}x{n_warps}"
        with _compiled_for(BLOCK=block, num_warps=n_warps):
            try:
                forward, backward = _passes(layer, repeats)
            except Exception as error:  # whatever compilers and drivers raise
                figures[f"problem {setting}"] = f"{type(error).__name__}: {error}"[:200]
            else:
                figures |= {
                    f"forward_seconds {setting}": forward,
                    f"backward_seconds {setting}": backward,
                }
    return figures


def _passes(layer: Layer, repeats: int) -> tuple[float, float]:
    attention = layer.attention()
    calls = (attention.forward, attention.backward())
    turns = clock_of(layer.x.device)(*calls, repeats=repeats)
    return turns.median(0), turns.median(1)


def _compiled_for(**others: int) -> AbstractContextManager[object]:
    """Kernels of tiles with ``others`` in place of the constants that the library chooses."""
    from vicinal.backends.triton import (
        launch as launching,  # not before it is known who runs the kernels
    )

    chosen = launching._constants

    def replaced(k: Tensor, v: Tensor) -> dict[str, Any]:
        return chosen(k, v) | others

    return mock.patch.object(launching, "_constants", replaced)


def scattered(layer: Layer, n_queries: int, repeats: int) -> Figures:
    """Times of a decoder's attention, of queries anywhere among the points, by rows of a tile.

    As CUDA graphs too, since such few queries take less time than it does to launch them.
    """
    q, k, v = layer.operands()
    device = layer.x.device
    order = torch.randperm(len(layer), generator=torch.Generator().manual_seed(0))
    queries = order[:n_queries].to(device)
    plans = [_decoder_plan(layer, queries, rows) for rows in ROWS]
    works = [Work(partial(layer.attend, plan=plan), (q[queries], k, v)) for plan in plans]
    kinds: dict[str, list[Call]] = {
        "forward": [work.forward for work in works],
        "step": [work.step for work in works],
    }
    figures: Figures = {
        "points": len(layer),
        "queries": n_queries,
        "rows_chosen": chosen_rows(n_queries, len(layer)),
    }
    for kind, calls in kinds.items():
        replays = [replayed(device, call) for call in calls]
        turns = clock_of(device)(*replays, *calls, repeats=repeats)
        for index, rows in enumerate(ROWS):
            figures[f"{kind}_seconds {rows}"] = turns.median(index)
            figures[f"{kind}_launched_seconds {rows}"] = turns.median(len(ROWS) + index)
    return figures


def _decoder_plan(layer: Layer, queries: Tensor, rows: int) -> NeighborhoodPlan:
    """Of the points at ``queries``, ``rows`` of them to a tile; points are tiled as ever."""
    offsets = torch.tensor([0, len(queries)], device=queries.device)
    positions, points, windows = layer.positions[queries], layer.pyramid, layer.scene.windows
    chosen = chosen_rows(len(points), len(queries))
    with choosing(lambda n_rows, n_others: rows if n_rows == len(queries) else chosen):
        plan = plan_neighborhoods(positions, offsets, points, windows)
        query_tiles(plan)
        point_tiles(plan)
    return plan
