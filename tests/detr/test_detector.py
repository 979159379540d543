"""The whole detector: training steps, edge cases, repeatability and dtypes."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from detr_scenes import (
    CLASSES,
    EMBED,
    OBJECTS,
    POINTS,
    gradients,
    make_detector,
    make_pyramid,
    make_targets,
    offsets_from_counts,
    perturbed,
    refused,
    spans,
)
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_close
from torch import Tensor

from vicinal import FeaturePyramid
from vicinal.detr import (
    Detector,
    DetectorOutput,
    PointStem,
    Predictions,
    SetCriterion,
    Targets,
    select_detections,
    sum_losses,
)


def step(detector: Detector, pyramid: FeaturePyramid, targets: Targets) -> Tensor:
    """The loss; its gradients are in the parameters."""
    detector.zero_grad()
    loss = sum_losses(SetCriterion()(detector(pyramid), targets))
    loss.backward()
    return loss.detach()


def tensors(output: DetectorOutput) -> list[Tensor]:
    last = output.layers[-1]
    return [output.pyramid.values, output.selection.chosen, last.logits, last.boxes]


@pytest.mark.parametrize("position_dim", [1, 2, 3])
def test_a_step_gives_all_parameters_gradients(position_dim: int) -> None:
    detector = perturbed(make_detector(position_dim))
    pyramid, targets = make_pyramid(POINTS, position_dim), make_targets(OBJECTS, position_dim)
    assert step(detector, pyramid, targets).isfinite()
    for name, grad in gradients(detector).items():
        assert grad is not None, name
        assert grad.isfinite().all(), name
        assert grad.any(), name


def test_the_first_step_has_gradients_for_all_but_hidden_layers_of_boxes() -> None:
    """The last layer of a box is initialized to zero, so earlier ones have no gradient yet."""
    detector = make_detector().double()
    step(detector, make_pyramid(POINTS), make_targets(OBJECTS))
    still = {name for name, grad in gradients(detector).items() if grad is None or not grad.any()}
    heads = ["selection.head", "decoder.heads.0", "decoder.heads.1"]
    layers = ["box.0.weight", "box.0.bias", "box.2.weight", "box.2.bias"]
    assert still == {f"{head}.{layer}" for head in heads for layer in layers}


@pytest.mark.parametrize("position_dim", [2, 3])
def test_overfits_a_batch(position_dim: int) -> None:
    detector = make_detector(position_dim, n_queries=6)
    pyramid = make_pyramid((25, 20), position_dim, dtype=torch.float32)
    targets = make_targets((2, 3), position_dim, dtype=torch.float32)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        losses.append(float(step(detector, pyramid, targets)))
        optimizer.step()
    assert min(losses[-5:]) < losses[0] / 2
    found = select_detections(detector.eval()(pyramid).layers[-1])
    assert found.scores.max() > 0.1  # a hundredth in the beginning


@pytest.mark.parametrize(
    ("n_points", "n_objects", "n_queries"),
    [
        ((), (), 5),  # no images
        ((0,), (0,), 5),
        ((0, 0), (2, 1), 5),  # objects without points
        ((9, 7), (0, 0), 5),  # no objects
        ((9, 0, 7), (0, 3, 1), 5),
        ((9, 7), (2, 1), 1),  # one query
        ((1, 1), (1, 2), 5),  # one point
        ((9, 3), (12, 8), 5),  # more objects than queries, and than points
    ],
)
@pytest.mark.parametrize("position_dim", [2, 3])
def test_losses_and_gradients_are_finite_with_few_or_no_points_and_objects(
    position_dim: int, n_points: Sequence[int], n_objects: Sequence[int], n_queries: int
) -> None:
    detector = perturbed(make_detector(position_dim, n_queries=n_queries))
    pyramid = make_pyramid(n_points, position_dim)
    loss = step(detector, pyramid, make_targets(n_objects, position_dim))
    assert loss.isfinite()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(detector).values())
    found = select_detections(detector.eval()(pyramid).layers[-1])
    assert len(found.offsets) == len(n_points) + 1


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 4, 4],  # three quarters of it beyond the map
        [12, 10, 2, 2],
        [6, 5, 12, 10],  # the whole map
        [6, 5, 1e-3, 1e-3],  # between all points
        [-20, 50, 3, 3],  # far from the map
        [6, 5, 1e4, 1e4],
    ],
)
def test_boxes_at_edges_give_finite_losses(box: list[float]) -> None:
    detector = perturbed(make_detector())
    boxes = torch.tensor([box, box], dtype=torch.float64)
    targets = Targets(boxes, torch.tensor([0, 1]), torch.tensor([0, 2]))
    assert step(detector, make_pyramid((20,)), targets).isfinite()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(detector).values())


def test_values_that_are_not_finite_are_refused() -> None:
    detector, pyramid = perturbed(make_detector()), make_pyramid((9, 8))
    values = pyramid.values.clone()
    values[2] = math.nan
    with refused("pyramid.values"):
        step(detector, pyramid.with_values(values), make_targets((2, 1)))
    assert all(grad is None for grad in gradients(detector).values())


def test_predictions_that_are_not_finite_are_refused_by_the_matcher() -> None:
    targets = make_targets((2, 1))
    for part, argument in (("classes", "predictions.logits"), ("box", "predictions.boxes")):
        detector = perturbed(make_detector())
        head: Any = getattr(detector.decoder.heads[-1], part)
        bias = head.bias if part == "classes" else head[-1].bias
        torch.nn.init.constant_(bias, math.nan)
        with refused(argument):
            step(detector, make_pyramid((9, 8)), targets)


def test_images_are_independent() -> None:
    detector, pyramid = perturbed(make_detector()), make_pyramid(POINTS)
    output = detector(pyramid)
    for image, rows in enumerate(spans(pyramid.batch_offsets())):
        coordinates = pyramid.coordinates[rows].clone()
        coordinates[:, 0] = 0
        alone = detector(FeaturePyramid(pyramid.values[rows], coordinates, pyramid.level_shapes, 1))
        assert_close(alone.pyramid.values, output.pyramid.values[rows], 1e-9)
        for ours, theirs in zip(alone.layers, output.layers, strict=True):
            queries = spans(theirs.offsets)[image]
            assert_close(ours.logits, theirs.logits[queries], 1e-9)
            assert_close(ours.boxes, theirs.boxes[queries], 1e-9)


def test_the_same_bits_twice_and_from_its_saved_state() -> None:
    detector, pyramid, targets = (
        perturbed(make_detector()),
        make_pyramid(POINTS),
        make_targets(OBJECTS),
    )
    other = make_detector().double()
    other.load_state_dict(copy.deepcopy(detector.state_dict()))
    losses = [step(model, pyramid, targets) for model in (detector, other, detector)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    for name, grad in gradients(detector).items():
        again = gradients(other)[name]
        assert grad is not None, name
        assert again is not None, name
        assert torch.equal(grad, again), name
    for ours, theirs in zip(tensors(detector(pyramid)), tensors(other(pyramid)), strict=True):
        assert torch.equal(ours, theirs)


def test_checkpointing_gives_the_same_bits() -> None:
    plain, again = perturbed(make_detector()), make_detector(checkpoint=True).double()
    again.load_state_dict(plain.state_dict())
    pyramid, targets = make_pyramid(POINTS), make_targets(OBJECTS)
    assert torch.equal(step(plain, pyramid, targets), step(again, pyramid, targets))
    for name, grad in gradients(plain).items():
        other = gradients(again)[name]
        assert grad is not None, name
        assert other is not None, name
        assert torch.equal(grad, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predicts_in_the_dtype_of_its_parameters(dtype: torch.dtype) -> None:
    detector = perturbed(make_detector()).to(dtype)
    output = detector(make_pyramid(POINTS, dtype=dtype))
    parts = (*tensors(output), *output.queries[1][:2], output.selection.positions)
    assert {x.dtype for x in parts} == {dtype, torch.int64}
    for x in parts:
        assert x.isfinite().all()
    exact = detector.double()(make_pyramid(POINTS))
    assert_close(output.layers[-1].boxes.double(), exact.layers[-1].boxes, 1e-2)


def test_autocast_keeps_embeddings_and_boxes_in_full_precision() -> None:
    detector = perturbed(make_detector()).float()
    pyramid = make_pyramid(POINTS, dtype=torch.float32)
    targets = make_targets(OBJECTS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = detector(pyramid)
        losses = SetCriterion()(output, targets)
    assert output.pyramid.values.dtype == torch.float32
    for queries, predictions in zip(output.queries, output.layers, strict=True):
        assert queries.embeddings.dtype == queries.boxes.dtype == torch.float32
        assert predictions.boxes.dtype == torch.float32
    assert sum_losses(losses).isfinite()
    assert sum_losses(losses).dtype == torch.float32
    sum_losses(losses).backward()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(detector).values())


def test_a_stem_and_a_detector_train_together() -> None:
    stem, detector = PointStem(1, EMBED, (1, 2), (3,), (1,)), make_detector()
    cells = torch.cartesian_prod(torch.arange(2), torch.arange(12), torch.arange(10))[::3]
    order = torch.randperm(len(cells))
    pyramid = stem(cells[order], torch.randn(len(cells), 1), (12, 10), 2)
    loss = step(detector, pyramid, make_targets((2, 3), dtype=torch.float32))
    assert loss.isfinite()
    assert all(grad is not None for grad in gradients(stem).values())


@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.integers(1, 8),
    st.integers(0, 100),
)
def test_detections_are_the_top_k_pairs_of_query_and_class(
    counts: list[int], top_k: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = sum(counts)
    logits = torch.randint(-3, 3, (n, CLASSES), generator=generator).double()  # with ties
    boxes = torch.rand(n, 4, generator=generator, dtype=torch.float64) + 0.1
    found = select_detections(Predictions(logits, boxes, offsets_from_counts(counts)), top_k)
    expected = []
    for rows in spans(offsets_from_counts(counts)):
        pairs = [(row, label) for row in range(rows.start, rows.stop) for label in range(CLASSES)]
        expected.append(sorted(pairs, key=lambda pair: (-float(logits[pair]), pair))[:top_k])
    flat = [pair for pairs in expected for pair in pairs]
    assert list(zip(found.queries.tolist(), found.labels.tolist(), strict=True)) == flat
    assert found.offsets.tolist() == offsets_from_counts(list(map(len, expected))).tolist()
    assert_close(found.boxes, boxes[[row for row, _ in flat]], 0)
    scores = [1 / (1 + math.exp(-float(logits[pair]))) for pair in flat]
    assert_close(found.scores, torch.tensor(scores, dtype=torch.float64), 1e-12)


def test_detections_of_half_precision_logits_rank_high_scores() -> None:
    logits = torch.tensor([[7.0], [7.0625]], dtype=torch.bfloat16)
    assert logits.sigmoid().unique().numel() == 1
    found = select_detections(Predictions(logits, torch.ones(2, 4), torch.tensor([0, 2])))
    assert found.queries.tolist() == [1, 0]
    assert found.scores.dtype == torch.float32


def test_detections_have_no_gradient_and_refuse_invalid_predictions() -> None:
    predictions = perturbed(make_detector())(make_pyramid((9, 8))).layers[-1]
    assert not select_detections(predictions).scores.requires_grad
    assert not select_detections(predictions).boxes.requires_grad
    with refused("top_k"):
        select_detections(predictions, 0)
    with refused("predictions"):
        select_detections(tuple(predictions))  # type: ignore[arg-type]
    with refused("predictions.offsets"):
        select_detections(predictions._replace(offsets=predictions.offsets + 1))
