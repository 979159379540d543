"""Denoising queries: their order, their noise, and that they do not affect other queries."""

import itertools
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
    WRONG_TARGETS,
    gradients,
    make_detector,
    make_pyramid,
    make_queries,
    make_targets,
    perturbed,
    random_images,
    refused,
)
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_close

from vicinal.detr import (
    DenoisingQueryGenerator,
    DetectionLoss,
    Predictions,
    SetCriterion,
    Targets,
    make_denoising_queries,
    sum_losses,
)


def random_targets(counts: list[int], position_dim: int = 2) -> Targets:
    return random_images([(0, count) for count in counts], position_dim)[1]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 3))
def test_images_have_their_objects_once_per_group(
    counts: list[int], n_groups: int, position_dim: int
) -> None:
    targets = random_targets(counts, position_dim)
    queries = make_denoising_queries(targets, n_groups, n_classes=3)
    edges = list(itertools.pairwise(targets.offsets.tolist()))
    expected = [
        (row, group)
        for start, stop in edges
        for group in range(n_groups)
        for row in range(start, stop)
    ]
    assert list(zip(queries.target.tolist(), queries.group.tolist(), strict=True)) == expected
    assert queries.offsets.tolist() == [n_groups * offset for offset in targets.offsets.tolist()]
    assert queries.boxes.shape == (len(expected), 2 * position_dim)
    assert queries.matches().prediction.tolist() == list(range(len(expected)))
    assert queries.matches().target.tolist() == [row for row, _ in expected]


def test_without_noise_queries_are_the_objects() -> None:
    targets = random_targets([2, 0, 3], 3)
    queries = make_denoising_queries(targets, 4, label_noise=0, box_noise=0, n_classes=3)
    assert torch.equal(queries.boxes, targets.boxes[queries.target])
    assert torch.equal(queries.labels, targets.labels[queries.target])


@pytest.mark.parametrize("position_dim", [1, 2, 3])
@pytest.mark.parametrize("box_noise", [0.1, 0.4, 0.99])
def test_noise_of_boxes_is_uniform_and_keeps_centers_inside(
    position_dim: int, box_noise: float
) -> None:
    targets = random_targets([3, 2], position_dim)
    queries = make_denoising_queries(targets, 1000, box_noise=box_noise, n_classes=3)
    (center, size), (to_center, to_size) = (
        boxes.chunk(2, 1) for boxes in (queries.boxes, targets.boxes[queries.target])
    )
    shift, growth = (center - to_center) / (to_size / 2), size / to_size - 1
    for noise in (shift, growth):
        assert noise.abs().max() <= box_noise * (1 + 1e-6)
        assert_close(noise.mean(0), torch.zeros(position_dim).double(), 0.05 * box_noise)
        spread = torch.full((position_dim,), box_noise / math.sqrt(3), dtype=torch.float64)
        assert_close(noise.std(0), spread, 0.05 * box_noise)
    both = torch.cat((shift, growth), 1)
    assert_close(both.t().corrcoef(), torch.eye(2 * position_dim).double(), 0.07)


@pytest.mark.parametrize("label_noise", [0.0, 0.2, 1.0])
def test_labels_change_to_any_other_class_with_the_given_probability(label_noise: float) -> None:
    targets = random_targets([3, 2])._replace(labels=torch.tensor([0, 1, 2, 3, 3]))
    queries = make_denoising_queries(targets, 2000, label_noise=label_noise, n_classes=4)
    step = (queries.labels - targets.labels[queries.target]) % 4
    shares = step.bincount(minlength=4) / len(step)
    expected = torch.tensor([1 - label_noise, *[label_noise / 3] * 3])
    assert_close(shares, expected, 0.02)
    assert ((queries.labels >= 0) & (queries.labels < 4)).all()


def test_a_single_class_is_not_changed() -> None:
    targets = random_targets([3])._replace(labels=torch.zeros(3, dtype=torch.int64))
    queries = make_denoising_queries(targets, 5, label_noise=1, n_classes=1)
    assert queries.labels.tolist() == [0] * 15


def test_a_generator_repeats_the_noise_and_leaves_the_global_one_alone() -> None:
    targets = random_targets([3, 2])
    state = torch.get_rng_state()
    first, second = (
        make_denoising_queries(targets, 3, n_classes=3, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    assert torch.equal(torch.get_rng_state(), state)
    other = make_denoising_queries(
        targets, 3, n_classes=3, generator=torch.Generator().manual_seed(8)
    )
    assert not torch.equal(first.boxes, other.boxes)
    torch.manual_seed(7)
    assert all(map(torch.equal, first, make_denoising_queries(targets, 3, n_classes=3)))


def test_noise_does_not_depend_on_the_rest_of_the_batch() -> None:
    """So two processes with an image each have the noise of one process with both."""
    targets = random_targets([3, 0, 2])
    whole = make_denoising_queries(
        targets, 2, n_classes=3, generator=torch.Generator().manual_seed(3)
    )
    for image, (start, stop) in enumerate(itertools.pairwise(targets.offsets.tolist())):
        offsets = torch.tensor([0, stop - start])
        alone = Targets(targets.boxes[start:stop], targets.labels[start:stop], offsets)
        part = make_denoising_queries(
            alone, 2, n_classes=3, generator=torch.Generator().manual_seed(3)
        )
        rows = slice(*whole.offsets[image : image + 2].tolist())
        assert torch.equal(part.boxes, whole.boxes[rows])
        assert torch.equal(part.labels, whole.labels[rows])


def test_groups_differ_in_their_noise() -> None:
    queries = make_denoising_queries(random_targets([4]), 2, n_classes=3)
    assert (queries.boxes[:4] != queries.boxes[4:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boxes_keep_their_dtype_and_integers_become_int64(dtype: torch.dtype) -> None:
    boxes, labels, offsets = random_targets([3, 2])
    targets = Targets(boxes.to(dtype), labels.int(), offsets.int())
    queries = make_denoising_queries(targets, 2, n_classes=3)
    assert [part.dtype for part in queries] == [dtype, *[torch.int64] * 4]


def test_restored_objects_have_no_loss() -> None:
    targets = random_targets([3, 0, 2])
    queries = make_denoising_queries(targets, 3, n_classes=3)
    logits = 40 * torch.nn.functional.one_hot(targets.labels[queries.target], 3).double() - 20
    found = Predictions(logits, targets.boxes[queries.target], queries.offsets)
    assert max(DetectionLoss()(found, targets, queries.matches(), 15.0)) < 1e-7
    noisy = found._replace(boxes=queries.boxes)
    assert DetectionLoss()(noisy, targets, queries.matches(), 15.0).l1 > 0.1


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("n_groups", -1),
        ("n_groups", 1.5),
        ("label_noise", 1.1),
        ("label_noise", math.nan),
        ("box_noise", 1.0),
        ("box_noise", -0.1),
        ("n_classes", 0),
    ],
)
def test_refused_numbers(argument: str, value: Any) -> None:
    accepted: dict[str, Any] = {"n_groups": 2, "n_classes": 3}
    with refused(argument, str(value)):
        make_denoising_queries(random_targets([2]), **accepted | {argument: value})


@pytest.mark.parametrize(("targets", "argument", "came"), WRONG_TARGETS)
def test_refused_targets(targets: Any, argument: str, came: str) -> None:
    with refused(argument, came):
        make_denoising_queries(targets, 2, n_classes=3)


@pytest.mark.parametrize("position_dim", [2, 3])
def test_denoising_queries_match_their_objects_and_do_not_affect_others(
    position_dim: int,
) -> None:
    detector = perturbed(
        make_detector(position_dim, denoiser=DenoisingQueryGenerator(EMBED, CLASSES, 2))
    )
    pyramid, targets = make_pyramid(POINTS, position_dim), make_targets(OBJECTS, position_dim)
    output = detector(pyramid, targets)
    with refused("targets"):
        detector(pyramid)
    plain = detector.eval()(pyramid)
    assert plain.denoising is None
    assert detector(pyramid, targets).denoising is None
    for ours, theirs in zip(output.layers, plain.layers, strict=True):
        assert torch.equal(ours.offsets, theirs.offsets)
        assert_close(ours.logits, theirs.logits, 1e-9)
        assert_close(ours.boxes, theirs.boxes, 1e-9)

    assert output.denoising is not None
    layers, matches = output.denoising
    assert torch.equal(matches.prediction, torch.arange(2 * sum(OBJECTS)))
    assert torch.equal(matches.target.bincount(), torch.full((sum(OBJECTS),), 2))
    given = output.queries[0]
    assert given.groups is not None
    noisy = given.boxes[given.groups > 0]
    near = targets.boxes[matches.target]
    size = near[:, position_dim:].repeat(1, 2)
    assert ((noisy - near).abs() <= 0.4 * size + 1e-9).all()
    assert noisy.unique(dim=0).shape == noisy.shape
    for predictions in layers:
        assert torch.equal(predictions.offsets, 2 * targets.offsets)
    assert given.offsets.tolist() == (plain.layers[0].offsets + 2 * targets.offsets).tolist()


def test_groups_of_the_queries_stay_apart() -> None:
    """From those of the denoising queries, too."""
    pyramid, targets = make_pyramid(POINTS), make_targets(OBJECTS)
    own = torch.tensor([3, 0, 3, 1, 0])
    queries = make_queries((2, 1, 0, 2))._replace(groups=own)
    joined = DenoisingQueryGenerator(EMBED, CLASSES, 2).double()(queries, targets, pyramid)
    groups = joined.queries.groups
    assert groups is not None
    assert torch.equal(groups[joined.detection_rows], own)
    assert sorted(set(groups[joined.denoising_rows].tolist())) == [4, 5]


def test_targets_of_another_dimension_are_refused_by_the_denoiser() -> None:
    detector = perturbed(make_detector(3, denoiser=DenoisingQueryGenerator(EMBED, CLASSES)))
    with refused("targets.boxes"):
        detector(make_pyramid((6,), 3), make_targets((2,), 2))


def test_levels_of_denoising_queries_follow_the_size_of_their_boxes() -> None:
    sizes = [[1.0, 1, 3, 3], [1, 1, 4.5, 4.5], [1, 1, 6, 6], [1, 1, 50, 50], [1, 1, 18, 1]]
    targets = Targets(
        torch.tensor(sizes, dtype=torch.float64), torch.arange(5) % CLASSES, torch.tensor([0, 5])
    )
    denoiser = DenoisingQueryGenerator(EMBED, CLASSES, 1, box_noise=0.0, box_size=4.0)
    detector = perturbed(make_detector(denoiser=denoiser))
    given = detector(make_pyramid((0,)), targets).queries[0]
    assert given.levels.tolist() == [0, 0, 1, 1, 0]  # cells of level 1 are twice as wide


def test_denoising_losses_are_those_of_layers() -> None:
    detector = perturbed(make_detector(denoiser=DenoisingQueryGenerator(EMBED, CLASSES)))
    pyramid, targets = make_pyramid(POINTS), make_targets(OBJECTS)
    output = detector(pyramid, targets)
    losses = SetCriterion()(output, targets)
    without = SetCriterion()(output._replace(denoising=None), targets)
    assert output.denoising is not None
    layers, matches = output.denoising
    for index, predictions in enumerate(layers):
        part = DetectionLoss()(predictions, targets, matches, 3 * sum(OBJECTS))
        for name, value in part._asdict().items():
            assert_close(losses.pop(f"denoising {index} {name}"), value, 1e-12)
    assert losses.keys() == without.keys()
    assert all(torch.equal(losses[name], without[name]) for name in without)
    sum_losses(SetCriterion()(output, targets)).backward()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(detector).values())


@pytest.mark.parametrize(("n_points", "n_objects"), [((), ()), ((0, 5), (2, 0)), ((3, 4), (0, 0))])
def test_denoising_with_few_or_no_points_and_objects(
    n_points: Sequence[int], n_objects: Sequence[int]
) -> None:
    detector = perturbed(make_detector(denoiser=DenoisingQueryGenerator(EMBED, CLASSES)))
    targets = make_targets(n_objects)
    losses = SetCriterion()(detector(make_pyramid(n_points), targets), targets)
    sum_losses(losses).backward()
    assert sum_losses(losses).isfinite()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(detector).values())


def test_invalid_denoising_arguments_are_refused_by_name() -> None:
    options: dict[str, Any] = {"embed_dim": EMBED, "n_classes": CLASSES}
    for argument, wrong in {"embed_dim": 0, "n_classes": 0, "n_groups": 0, "box_size": 0.0}.items():
        with refused(argument):
            DenoisingQueryGenerator(**options | {argument: wrong})
    detector = perturbed(make_detector(denoiser=DenoisingQueryGenerator(EMBED, CLASSES)))
    for argument, targets in {
        "targets.offsets": make_targets((1, 1, 1)),
        "targets": [1, 2],
    }.items():
        with refused(argument):
            detector(make_pyramid((4, 4)), targets)  # type: ignore[arg-type]
