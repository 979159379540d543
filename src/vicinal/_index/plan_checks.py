"""Checks of a plan against the data that it is used with."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from .._utils.checks import reads_contents, refuse
from ..pyramid import FeaturePyramid


def check_plan_facts(plan: Any, facts: dict[str, tuple[Any, Any]]) -> None:
    """Raises ValueError unless the plan's and the given value of every fact are equal."""
    for name, (planned, given) in facts.items():
        if planned != given:
            refuse("plan", f"one made for {name} {given}", f"one made for {planned}: {plan!r}")


def check_plan_points(
    plan: Any,
    planned: Tensor,
    pyramid: FeaturePyramid,
    check_contents: bool | None = None,
) -> None:
    """Raises ValueError unless the pyramid has the points that a plan was made for.

    ``planned`` are their coordinates, zero where the point was misplaced.
    """
    coordinates = pyramid.coordinates
    if planned.shape[0] != coordinates.shape[0]:
        refuse_plan(plan, "points", f"stacked_feature_maps with {coordinates.shape[0]} points")
    if not reads_contents(check_contents, coordinates.device):
        return
    planned = planned.long()
    if torch.equal(coordinates, planned):
        return
    if not torch.equal(coordinates.masked_fill(pyramid.misplaced()[:, None], 0), planned):
        row = int((coordinates != planned).any(1).nonzero()[0])
        given = f"point {row} at [image, cell, level] {coordinates[row].tolist()}"
        refuse_plan(plan, "points", f"stacked_feature_maps with {given}")


def refuse_plan(plan: Any, what: str, argument: str) -> NoReturn:
    """Raises the ValueError of a plan that was made for other ``what`` than ``argument`` holds."""
    raise ValueError(
        f"plan: made for other {what}; expected a plan made for those of {argument}, got {plan!r}"
    )
