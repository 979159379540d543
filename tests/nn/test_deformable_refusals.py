"""Invalid arguments of deformable attention, with and without checks of contents."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from deformable_scenes import EMBED, EXACT, SCENES, gradients, make_arguments, make_module
from problems import assert_close, make_scene, sparse_coo
from torch import Tensor

from vicinal import FeaturePyramid, SparseDeformableAttention
from vicinal._index.cell_hash import index_cells

# --------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_positions_raise_or_are_excluded(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene, background=True)
    positions = arguments.query_spatial_positions.detach().clone()
    positions[4, 1] = value
    nonfinite = arguments._replace(query_spatial_positions=positions.requires_grad_())
    with pytest.raises(ValueError, match="query_spatial_positions: expected finite"):
        module(**nonfinite._asdict())
    # Without checks of contents, as on a GPU, such a query is excluded.
    monkeypatch.setattr("vicinal.placement.reads_contents", lambda *_: False)
    mask = torch.arange(11) == 4
    masked = arguments._replace(query_mask=mask)
    out, expected = module(**nonfinite._asdict()), module(**masked._asdict())
    assert torch.equal(out, expected)
    for left, right in zip(
        gradients(out, module, nonfinite), gradients(expected, module, masked), strict=True
    ):
        assert torch.equal(left, right)


def test_queries_outside_all_offsets_are_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene, background=True)
    monkeypatch.setattr("vicinal.placement.reads_contents", lambda *_: False)
    short = arguments._replace(query_batch_offsets=torch.tensor([0, 5, 5, 9]))
    masked = arguments._replace(query_mask=torch.arange(11) >= 9)
    assert torch.equal(module(**short._asdict()), module(**masked._asdict()))


def test_points_outside_the_map_are_excluded() -> None:
    scene = SCENES[2]
    pyramid = scene.pyramid
    rows = [[0, 6, 3, 0], [0, -1, 0, 1], [7, 0, 0, 0], [0, 0, 0, 9], [-1, 0, 0, 0]]
    bad = torch.cat((pyramid.coordinates, torch.tensor(rows)))
    module, arguments = make_module(scene), make_arguments(scene)
    values = torch.cat((arguments.stacked_feature_maps.values, torch.ones(5, EMBED)))
    more = FeaturePyramid(values, bad, pyramid.level_shapes, 3, check_contents=False)
    out = module(**arguments._replace(stacked_feature_maps=more)._asdict())
    assert_close(out, module(**arguments._asdict()), EXACT)


# -------------------------------------------------------------------------------- attention weights


@pytest.mark.parametrize(
    ("queries", "came"),
    [
        (torch.tensor([0, 11]), "11"),
        (torch.tensor([-1]), "-1"),
        (torch.tensor([[0]]), "[1, 1]"),
        (torch.tensor([0.0]), "float32"),
        ([0], "list"),
    ],
)
def test_invalid_queries_of_attention_weights_raise(queries: Any, came: str) -> None:
    call = make_arguments(SCENES[2])._asdict()
    with pytest.raises(ValueError, match=r"^queries: expected") as refusal:
        make_module(SCENES[2]).attention_weights(**call, queries=queries)
    assert came in str(refusal.value).split("got")[-1]


# -------------------------------------------------------------------------------- invalid arguments


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("embed_dim", 10),  # not a multiple of 4 heads
        ("embed_dim", 0),
        ("embed_dim", 16.0),
        ("n_heads", 0),
        ("n_levels", -1),
        ("n_points", 0),
        ("n_points", 2.0),
        ("position_dim", 0),
        ("dropout", 1.0),
        ("dropout", -0.1),
    ],
)
def test_invalid_constructor_arguments_raise(argument: str, value: object) -> None:
    options: dict[str, Any] = {"embed_dim": 16, "n_heads": 4} | {argument: value}
    with pytest.raises(ValueError, match=f"^{argument}: expected .* got .*{value}"):
        SparseDeformableAttention(**options)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64} | options)


MAP = SCENES[2].pyramid.with_values(zeros(60, EMBED))


OTHER = make_scene(((6, 4), (5, 5)), (1, 1), (5, 0, 6), 60)


@pytest.mark.parametrize(
    ("argument", "value", "came"),
    [
        ("query", zeros(11), "[11]"),
        ("query", zeros(11, 5), "[11, 5]"),
        ("query", zeros(11, EMBED, dtype=torch.float32), "float32"),
        ("query", None, "None"),
        ("query_spatial_positions", zeros(10, 2), "[10, 2]"),
        ("query_spatial_positions", zeros(11, 3), "[11, 3]"),
        ("query_spatial_positions", zeros(11, 2, dtype=torch.int64), "int64"),
        ("query_batch_offsets", torch.tensor([0, 6, 5, 11]), "5 after 6"),
        ("query_batch_offsets", zeros(4), "float64"),
        ("stacked_feature_maps", MAP.to_coo().to_dense(), "[3, 9, 8, 3, 6]"),
        ("stacked_feature_maps", MAP.with_values(zeros(60, 4)), "[60, 4]"),
        ("stacked_feature_maps", MAP.with_values(MAP.values.float()), "float32"),
        ("stacked_feature_maps", None, "None"),
        ("level_spatial_shapes", [[6, 4], [5, 5], [9, 9]], "(9, 9)"),
        ("level_spatial_shapes", [[6, 4], [9, 8]], "(9, 8)"),
        ("background_embedding", zeros(2, 3, EMBED), "[2, 3, 6]"),
        ("background_embedding", zeros(3, 2, EMBED), "[3, 2, 6]"),
        ("query_level_indices", torch.full((11,), 3), "3"),
        ("query_level_indices", zeros(11), "float64"),
        ("query_mask", zeros(11), "float64"),
        ("query_mask", torch.zeros(10, dtype=torch.bool), "[10]"),
        ("plan", SCENES[2].plan(), "NeighborhoodPlan"),
        ("plan", index_cells(OTHER.pyramid), "cells="),
    ],
)
def test_invalid_arguments_raise(argument: str, value: object, came: str) -> None:
    call = make_arguments(SCENES[2])._asdict() | {"level_spatial_shapes": MAP.level_shapes}
    call |= {argument: value}
    with pytest.raises(ValueError, match="expected") as refusal:
        make_module(SCENES[2])(**call)
    message = str(refusal.value)
    assert message.startswith(f"{argument}: expected ")
    assert came in message.split("got")[-1]


def test_sparse_map_without_valid_level_shapes_raises() -> None:
    call = make_arguments(SCENES[2])._asdict() | {"stacked_feature_maps": MAP.to_coo()}
    with pytest.raises(ValueError, match=r"^level_spatial_shapes: expected"):
        make_module(SCENES[2])(**call)
    coo = sparse_coo(torch.tensor([[0], [8], [7], [0]]), zeros(1, EMBED), (3, 9, 8, 3, EMBED))
    call |= {"stacked_feature_maps": coo, "level_spatial_shapes": MAP.level_shapes}
    with pytest.raises(ValueError, match="stacked_feature_maps: expected cells inside"):
        make_module(SCENES[2])(**call)


def test_invalid_arguments_of_make_plan_raise() -> None:
    scene = SCENES[2]
    module = make_module(scene)
    with pytest.raises(ValueError, match=r"^pyramid: expected"):
        module.make_plan(scene.positions, scene.offsets, MAP.to_coo())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^query_batch_offsets: expected"):
        module.make_plan(scene.positions, scene.offsets[1:], scene.pyramid)
    with pytest.raises(ValueError, match=r"^pyramid: expected"):
        index_cells(MAP.to_coo())  # type: ignore[arg-type]
    huge = dataclasses.replace(MAP, level_shapes=((2**31, 2**31),) * 3, check_contents=False)
    with pytest.raises(ValueError, match="level_shapes: expected fewer than"):
        index_cells(huge)


def test_unvalidated_query_levels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deformable attention does not use them."""
    module, arguments = make_module(SCENES[2]), make_arguments(SCENES[2])
    expected = module(**arguments._asdict())
    monkeypatch.setattr("vicinal.nn._base.reads_contents", lambda *_: False)
    levels = torch.full((11,), 99)
    out = module(**arguments._asdict(), query_level_indices=levels)
    assert torch.equal(out, expected)
