"""The tiles that the kernels walk, and other numbers of rows to a tile than the library chooses.

The library chooses by shape alone and offers no such setting, so it is changed from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import torch

import vicinal._index.tiles
from benchmarks.layer import Layer
from vicinal import NeighborhoodPlan
from vicinal.backends import choose_backend, triton
from vicinal.backends.types import Tiles


def query_tiles(plan: NeighborhoodPlan) -> Tiles:
    """All that a forward needs beside the plan; found once."""
    choose_backend("triton", plan.device)  # loads the kernels, or says why it cannot
    return plan._query_tiles(triton.find_runs)


def point_tiles(plan: NeighborhoodPlan) -> Tiles:
    """What a backward pass needs as well."""
    choose_backend("triton", plan.device)
    return plan._point_tiles(triton.find_runs)


def plan_of_forward(layer: Layer) -> object:
    """Plans all that a forward needs."""
    with torch.no_grad():  # on a GPU tiles are found with the plan, of points only for gradients
        return query_tiles(layer.make_plan())


def plan_of_step(layer: Layer) -> object:
    """Plans all that a training step needs."""
    plan = layer.make_plan()
    return query_tiles(plan), point_tiles(plan)


def chosen_rows(n_rows: int, n_others: int) -> int:
    """The library's choice."""
    return vicinal._index.tiles.tile_rows(n_rows, n_others)


def choosing(rows: Callable[[int, int], int]) -> AbstractContextManager[object]:
    """Tiles found in here have as many rows as ``rows(n_rows, n_others)`` says."""
    return mock.patch.object(vicinal._index.tiles, "tile_rows", rows)
