"""Selection of queries against sorting by hand, and the boxes that candidates begin with."""

from typing import Any

import pytest
import torch
from detr_scenes import CLASSES, EMBED, SHAPES, make_pyramid, refused, stir
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_close
from torch import Tensor

from vicinal import FeaturePyramid
from vicinal.detr import QuerySelection, apply_deltas

EXACT = 1e-12


def make_selection(n_queries: int = 4, **options: Any) -> QuerySelection:
    selection = QuerySelection(EMBED, CLASSES, n_queries, **options).double()
    stir(selection)
    return selection


def first_boxes(pyramid: FeaturePyramid, box_size: float) -> Tensor:
    """``box_size`` cells around every point, in cells of the full shape."""
    rows = []
    for _, *cell, level in pyramid.coordinates.tolist():
        widths = [
            full / size
            for full, size in zip(pyramid.level_shapes[0], pyramid.level_shapes[level], strict=True)
        ]
        centers = [(x + 0.5) * width for x, width in zip(cell, widths, strict=True)]
        rows.append([*centers, *[box_size * width for width in widths]])
    dim = pyramid.position_dim
    return torch.tensor(rows, dtype=torch.float64).view(-1, 2 * dim)


def check_by_hand(
    selection: QuerySelection, pyramid: FeaturePyramid, levels: list[int] | None = None
) -> None:
    """Sorts the candidates of each image alone."""
    wanted = range(pyramid.n_levels) if levels is None else levels
    candidates = [i for i, level in enumerate(pyramid.levels.tolist()) if level in wanted]
    boxes = first_boxes(pyramid, selection.box_size)
    with torch.no_grad():
        logits, boxes = selection.head(pyramid.values, boxes)
    evaluates = selection.n_eval_queries is not None and not selection.training
    n_queries = selection.n_eval_queries if evaluates else selection.n_queries
    chosen, counts, candidate_counts = [], [], []
    for image in range(pyramid.batch_size):
        rows = [i for i in candidates if pyramid.batch[i] == image]
        best = sorted(rows, key=lambda i: (-float(logits[i].max()), i))[:n_queries]
        chosen += best
        counts.append(len(best))
        candidate_counts.append(len(rows))

    found = selection(pyramid)
    assert found.points.tolist() == candidates
    assert found.candidates.offsets.diff().tolist() == candidate_counts
    assert_close(found.candidates.logits.detach(), logits[candidates], EXACT)
    assert_close(found.candidates.boxes.detach(), boxes[candidates], EXACT)
    assert_close(
        found.positions, first_boxes(pyramid, 1)[candidates, : pyramid.position_dim], EXACT
    )
    assert found.points[found.chosen].tolist() == chosen
    queries = found.queries
    assert queries.offsets.diff().tolist() == counts
    assert queries.offsets[0] == found.candidates.offsets[0] == 0
    assert torch.equal(queries.levels, pyramid.levels[chosen])
    assert_close(queries.boxes, boxes[chosen], EXACT)
    embeddings = selection.norm(selection.project(pyramid.values[chosen]))
    assert_close(queries.embeddings, embeddings, EXACT)


@pytest.mark.parametrize("position_dim", [1, 2, 3])
@pytest.mark.parametrize("levels", [None, [0], [1], [1, 0]])
def test_the_best_candidates_of_each_image_become_queries(
    levels: list[int] | None, position_dim: int
) -> None:
    selection = make_selection(levels=levels, position_dim=position_dim)
    check_by_hand(selection, make_pyramid((20, 0, 3, 11), position_dim), levels)


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(1, 7), st.integers(0, 50))
def test_of_any_images(counts: list[int], n_queries: int, seed: int) -> None:
    check_by_hand(make_selection(n_queries), make_pyramid(counts, seed=seed))


def test_evaluation_may_have_another_number_of_queries() -> None:
    selection, pyramid = make_selection(3, n_eval_queries=7), make_pyramid((11, 0, 5))
    check_by_hand(selection, pyramid)
    trained = selection(pyramid).queries
    assert trained.offsets.diff().tolist() == [3, 0, 3]
    check_by_hand(selection.eval(), pyramid)
    tested = selection(pyramid).queries
    assert tested.offsets.diff().tolist() == [7, 0, 5]
    assert torch.equal(tested.embeddings[:3], trained.embeddings[:3])
    assert torch.equal(selection.train()(pyramid).queries.embeddings, trained.embeddings)


def test_evaluation_has_the_queries_of_training_by_default() -> None:
    selection, pyramid = make_selection(3).eval(), make_pyramid((11, 2))
    check_by_hand(selection, pyramid)
    selection.n_queries = 5
    assert selection(pyramid).queries.offsets.diff().tolist() == [5, 2]


def test_the_first_of_equal_points_are_chosen() -> None:
    selection, pyramid = make_selection(3), make_pyramid((6, 2, 5))
    torch.nn.init.zeros_(selection.head.classes.weight)
    assert selection(pyramid).chosen.tolist() == [0, 1, 2, 6, 7, 8, 9, 10]
    check_by_hand(selection, pyramid)


@pytest.mark.parametrize("position_dim", [1, 2, 3])
def test_initial_boxes_are_some_cells_around_the_point(position_dim: int) -> None:
    selection = QuerySelection(EMBED, CLASSES, 50, position_dim=position_dim, box_size=2.5).double()
    pyramid = make_pyramid((20, 3), position_dim)
    found = selection(pyramid)
    assert_close(found.candidates.boxes, first_boxes(pyramid, 2.5), EXACT)
    assert_close(found.queries.boxes, found.candidates.boxes[found.chosen].detach(), 0)
    cells_wide = torch.tensor(
        [[SHAPES[position_dim][0][a] / SHAPES[position_dim][level][a] for a in range(position_dim)]
         for level in pyramid.levels.tolist()]
    )  # fmt: skip
    assert_close(found.candidates.boxes[:, position_dim:].detach().float(), 2.5 * cells_wide, 1e-6)


def test_gradients_reach_the_embeddings_and_never_the_boxes_of_queries() -> None:
    selection, pyramid = make_selection(), make_pyramid((9, 2))
    values = pyramid.values.clone().requires_grad_()
    found = selection(pyramid.with_values(values))
    assert not found.queries.boxes.requires_grad
    (grad,) = torch.autograd.grad(
        found.queries.embeddings.square().sum(), values, retain_graph=True
    )
    chosen = torch.zeros(11, dtype=torch.bool).index_fill(0, found.points[found.chosen], True)
    assert torch.equal(grad.any(1), chosen)
    for candidates in (found.candidates.logits, found.candidates.boxes):
        (grad,) = torch.autograd.grad(candidates.square().sum(), values, retain_graph=True)
        assert grad.any(1).all()


@pytest.mark.parametrize("counts", [(), (0,), (0, 0)])
def test_no_points_give_no_queries(counts: tuple[int, ...]) -> None:
    selection = make_selection()
    found = selection(make_pyramid(counts))
    assert found.queries.embeddings.shape == (0, EMBED)
    assert found.queries.offsets.tolist() == [0] * (len(counts) + 1)
    losses = found.queries.embeddings, found.candidates.logits, found.candidates.boxes
    torch.stack([x.sum() for x in losses]).sum().backward()
    assert all(p.grad is not None for p in selection.parameters())


def test_half_precision_distinguishes_cells_of_large_maps() -> None:
    coordinates = torch.tensor([[0, 1000, 0], [0, 1001, 0]])
    values = torch.randn(2, EMBED, dtype=torch.bfloat16)
    pyramid = FeaturePyramid(values, coordinates, ((2048,),), 1)
    found = QuerySelection(EMBED, CLASSES, 2, position_dim=1).bfloat16()(pyramid)
    assert found.positions.flatten().tolist() == [1000.5, 1001.5]
    assert sorted(found.queries.boxes[:, 0].tolist()) == [1000.5, 1001.5]
    assert found.queries.boxes.dtype == torch.float32


def test_boxes_of_candidates_are_refined_by_deltas() -> None:
    selection, pyramid = make_selection(), make_pyramid((9,))
    deltas = selection.head.box(pyramid.values)
    expected = apply_deltas(first_boxes(pyramid, selection.box_size), deltas)
    assert_close(selection(pyramid).candidates.boxes, expected, EXACT)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("n_queries", {"n_queries": 0}),
        ("n_queries", {"n_queries": 2.0}),
        ("n_eval_queries", {"n_eval_queries": 0}),
        ("n_eval_queries", {"n_eval_queries": 2.0}),
        ("levels", {"levels": []}),
        ("levels", {"levels": [0, -1]}),
        ("levels", {"levels": [0.5]}),
        ("box_size", {"box_size": 0.0}),
        ("box_size", {"box_size": float("nan")}),
        ("box_size", {"box_size": float("inf")}),
        ("embed_dim", {"embed_dim": 0}),
        ("n_classes", {"n_classes": 0}),
        ("position_dim", {"position_dim": 0}),
    ],
)
def test_invalid_options_are_refused_by_name(argument: str, options: dict[str, Any]) -> None:
    with refused(argument):
        QuerySelection(**{"embed_dim": EMBED, "n_classes": CLASSES, "n_queries": 3} | options)


def test_invalid_pyramids_are_refused_by_name() -> None:
    selection, pyramid = make_selection(levels=[2]), make_pyramid((5, 3))
    with refused("pyramid"):
        selection(pyramid)
    selection = make_selection()
    with refused("pyramid"):
        selection(pyramid.values)  # type: ignore[arg-type]
    with refused("pyramid"):
        selection(make_pyramid((5,), 3))
    with refused("pyramid.values"):
        selection(make_pyramid((5,), embed_dim=EMBED + 2))


def test_points_come_in_any_order_of_images() -> None:
    selection, pyramid = make_selection(), make_pyramid((5, 0, 3))
    order = torch.randperm(len(pyramid))
    mixed = FeaturePyramid(
        pyramid.values[order], pyramid.coordinates[order], pyramid.level_shapes, 3
    )
    ours, theirs = selection(mixed), selection(pyramid)
    assert torch.equal(ours.candidates.offsets, theirs.candidates.offsets)
    assert torch.equal(mixed.batch[ours.points], pyramid.batch[theirs.points])
    assert torch.equal(ours.positions, mixed.positions(torch.float64)[ours.points])
    assert torch.equal(ours.queries.offsets, theirs.queries.offsets)
    assert_close(ours.queries.embeddings, theirs.queries.embeddings, 1e-12)
    assert_close(ours.queries.boxes, theirs.queries.boxes, 1e-12)
