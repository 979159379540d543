"""Invalid records, views and arguments: errors name the argument and what came."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import make_scene
from records import CUBE, HEADS, IMAGE, SCENE, make_record

from vicinal import FeaturePyramid, NeighborhoodWeights, Window
from vicinal.visualize import AttentionRecord, View, draw_attention, draw_overview


def replaces(**fields: Any) -> Callable[[], object]:
    return lambda: dataclasses.replace(make_record(SCENE, IMAGE)[0], **fields)


def draws(**options: Any) -> Callable[[], object]:
    fields = {
        name: options.pop(name) for name in list(options) if name in AttentionRecord.__annotations__
    }
    record = dataclasses.replace(make_record(SCENE, IMAGE)[0], **fields)
    pyramid = options.pop("pyramid", SCENE.pyramid)
    draw = options.pop("draw", draw_attention)
    return lambda: draw(pyramid, record, **options)


def on_map(shapes: Any, size: Any, **options: Any) -> Callable[[], object]:
    """Draws a query with windows of this size on a map without points."""
    pyramid = FeaturePyramid(torch.zeros(0, 1), torch.zeros(0, 4).long(), shapes, 1, **options)
    nothing = NeighborhoodWeights(
        torch.zeros(2).long(), torch.zeros(0).long(), torch.zeros(0, 1), None
    )
    record = AttentionRecord(torch.ones(1, 2), nothing, [1, size])
    return lambda: View(pyramid, [record])


def seam(size: Any) -> Callable[[], object]:
    """On a map with four cells around the seam at level 1."""
    return on_map(((8, 8), (4, 4)), size, periodic_axes=(1,))


def odd_ratio(size: Any) -> Callable[[], object]:
    return on_map(((9, 8), (6, 4)), size)


WEIGHTS = make_record(SCENE, IMAGE)[0].weights
HYPERCUBE = make_scene(((2, 2, 2, 2),), (3,), (2,), 4)
REFUSALS: list[tuple[Callable[[], object], str, str]] = [
    (replaces(positions=torch.zeros(4, 2).long()), "positions", "int64"),
    (replaces(positions=torch.full((4, 2), math.nan)), "positions", "nan"),
    (replaces(positions=torch.zeros(3, 2)), "weights.offsets", "[5]"),
    (replaces(weights=torch.zeros(3)), "weights", "float32"),
    (replaces(weights=WEIGHTS._replace(points=WEIGHTS.points[1:])), "weights.weights", ""),
    (replaces(weights=WEIGHTS._replace(offsets=WEIGHTS.offsets.flip(0))), "weights.offsets", ""),
    (replaces(weights=WEIGHTS._replace(weights=WEIGHTS.weights / 0)), "weights.weights", "inf"),
    (replaces(weights=WEIGHTS._replace(background=torch.zeros(4, 2))), "weights.background", ""),
    (replaces(levels=torch.zeros(4)), "levels", "float32"),
    (replaces(boxes=torch.zeros(4, 2)), "boxes", "[4, 2]"),
    (replaces(boxes=torch.full((4, 4), math.inf)), "boxes", "inf"),
    (replaces(scores=torch.zeros(5)), "scores", "[5]"),
    (replaces(scores=torch.full((4,), math.nan)), "scores", "nan"),
    (replaces(labels=["a"]), "labels", "1"),
    (replaces(labels="abcd"), "labels", "abcd"),
    (replaces(labels=[1, 2, 3, 4]), "labels", "[1, 2, 3, 4]"),
    (draws(pyramid=None), "pyramid", "None"),
    (lambda: draw_attention(SCENE.pyramid, WEIGHTS), "record", "NeighborhoodWeights"),  # type: ignore[arg-type]
    (draws(pyramid=CUBE.pyramid), "positions", "[4, 2]"),
    (draws(batch_index=2), "batch_index", "2"),
    (draws(batch_index=0), "weights.points", "image 1"),
    (draws(weights=WEIGHTS._replace(points=WEIGHTS.points + 123)), "weights.points", "to 2"),
    (draws(neighborhood_sizes=(3,)), "neighborhood_sizes", "(3,)"),
    (draws(neighborhood_sizes=(3, 5, 7)), "neighborhood_sizes", "(3, 5, 7)"),
    (replaces(neighborhood_sizes=(3, 4)), "neighborhood_sizes", "[3, 4]"),
    (replaces(neighborhood_sizes=(0, 0)), "neighborhood_sizes", "[0, 0]"),
    (replaces(neighborhood_sizes=()), "neighborhood_sizes", "[]"),
    (replaces(neighborhood_sizes=3), "neighborhood_sizes", "3"),
    (replaces(neighborhood_sizes="3, 5"), "neighborhood_sizes", "3, 5"),
    (replaces(neighborhood_sizes=(3, (3, 3, 3))), "neighborhood_sizes", "(3, 3, 3)"),
    (replaces(neighborhood_sizes=(3, 2.5)), "neighborhood_sizes", "2.5"),
    (seam(5), "neighborhood_sizes", "size 5"),
    (seam(Window(3, dilation=2)), "neighborhood_sizes", "dilation 2"),
    (seam(Window(3, causal=(False, True))), "neighborhood_sizes", "causal"),
    (odd_ratio(Window(3, causal=(True, False))), "neighborhood_sizes", "9 at level 0"),
    (draws(levels=torch.tensor([0, 1, 2, 0])), "levels", "2"),
    (
        draws(weights=WEIGHTS._replace(background=torch.zeros(4, 3, HEADS))),
        "weights.background",
        "3",
    ),
    (draws(query=4), "query", "4"),
    (draws(query=-1), "query", "-1"),
    (draws(heads="all"), "heads", "all"),
    (draws(heads=[0, 3]), "heads", "[0, 3]"),
    (draws(heads=[]), "heads", "[]"),
    (draws(margin=-1), "margin", "-1"),
    (draws(axis=0), "axis", "0"),
    (draws(image=torch.zeros(2, 2, 4)), "image", "[2, 2, 4]"),
    (draws(image=torch.zeros(2, 2).long()), "image", "int64"),
    (draws(image=torch.full((2, 2), 2.0)), "image", "2"),
    (draws(image=torch.full((2, 2), math.nan)), "image", "nan"),
    (draws(image=[[0.0]]), "image", "list"),
    (lambda: draw_attention(CUBE.pyramid, make_record(CUBE, 0)[0], axis=3), "axis", "3"),
    (lambda: draw_attention(HYPERCUBE.pyramid, make_record(HYPERCUBE, 0)[0]), "pyramid", "4"),
    (draws(draw=draw_overview, level=2), "level", "2"),
    (draws(draw=draw_overview, queries=torch.tensor([4])), "queries", "4"),
    (draws(draw=draw_overview, queries=torch.tensor([0.5])), "queries", "float32"),
    (draws(draw=draw_overview, windows=1), "windows", "1"),
    (draws(draw=draw_overview, windows=True, neighborhood_sizes=None), "windows", "True"),
    (lambda: View(SCENE.pyramid, []), "records", "none"),
    (
        lambda: View(SCENE.pyramid, [make_record(SCENE, 0)[0], make_record(SCENE, 1)[0]]),
        "records",
        "[0, 1]",
    ),
]


@pytest.mark.parametrize(("call", "name", "came"), REFUSALS)
def test_refusals(call: Callable[[], object], name: str, came: str) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        call()
    message = str(refusal.value)
    assert message.startswith(f"{name}:") or message.startswith(f"{name} ("), message
    assert came in message.split("got")[-1], message
