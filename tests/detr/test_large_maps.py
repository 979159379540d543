"""Maps of so many cells that float32 cannot hold their centers."""

import pytest
import torch
from detr_scenes import (
    CLASSES,
    EMBED,
    HEADS,
    gradients,
    make_detector,
    make_queries,
    perturbed,
    refused,
)
from problems import assert_close
from torch import Tensor

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
from vicinal.detr import (
    DenoisingQueryGenerator,
    Detector,
    DetectorOutput,
    PointStem,
    SetCriterion,
    Targets,
    make_denoising_queries,
    sum_losses,
)

SMALL, LARGE = 1024, (2**24, 2**30)
HEIGHT = 16


def float_detector(denoiser: DenoisingQueryGenerator | None = None) -> Detector:
    def attention() -> SparseNeighborhoodAttentionBlock:
        return SparseNeighborhoodAttentionBlock(EMBED, HEADS, 2, (5, 3))

    return perturbed(make_detector(denoiser=denoiser, attention=attention)).float()


def make_scene(size: int) -> tuple[FeaturePyramid, Targets, int]:
    """A pyramid and objects near the end of the first axis, and how far they are moved."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(HEIGHT, (60, 2), generator=generator)
    shift = size - 2 * HEIGHT
    points = torch.cat((torch.zeros(60, 1).long(), cells + torch.tensor([shift, 0])), 1)
    values = torch.randn(60, EMBED, generator=generator)
    pyramid = FeaturePyramid.from_points(points, values, (size, HEIGHT), 1, strides=(1, 2))
    boxes = torch.tensor([[5.5, 6, 4, 3], [9.25, 10, 5, 5]], dtype=torch.float64)
    boxes[:, 0] += shift
    return pyramid, Targets(boxes, torch.tensor([1, 2]), torch.tensor([0, 2])), shift


def near_origin(boxes: Tensor, shift: int) -> Tensor:
    return torch.cat((boxes[:, :1].double() - shift, boxes[:, 1:].double()), 1)


@pytest.mark.parametrize("size", LARGE)
def test_a_translated_scene_gives_what_it_gives_on_a_small_map(size: int) -> None:
    detector, criterion = float_detector(), SetCriterion()
    small, small_targets, small_shift = make_scene(SMALL)
    large, large_targets, large_shift = make_scene(size)
    theirs, ours = detector(small), detector(large)
    assert ours.queries[0].boxes.dtype == torch.float64
    assert ours.layers[-1].logits.dtype == torch.float32
    assert_close(ours.pyramid.values, theirs.pyramid.values, 1e-4)
    assert torch.equal(ours.selection.chosen, theirs.selection.chosen)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert_close(one.logits, other.logits, 1e-4)
        moved = near_origin(one.boxes, large_shift), near_origin(other.boxes, small_shift)
        assert_close(*moved, 1e-3)
    losses = criterion(theirs, small_targets)
    for name, value in criterion(ours, large_targets).items():
        assert_close(value.float(), losses[name].float(), 1e-3)


def test_a_step_on_a_large_map_trains_float32_parameters() -> None:
    detector = float_detector(DenoisingQueryGenerator(EMBED, CLASSES, 2))
    pyramid, targets, _ = make_scene(2**30)
    output: DetectorOutput = detector(pyramid, targets)
    sum_losses(SetCriterion()(output, targets)).backward()
    for name, grad in gradients(detector).items():
        assert grad is not None, name
        assert grad.dtype == torch.float32, name
        assert grad.isfinite().all(), name
        assert grad.any(), name


def test_a_stem_embeds_a_translated_scene_the_same() -> None:
    stem = PointStem(1, EMBED, (1, 2), (3, 3), (1, 2))
    cells = torch.randint(HEIGHT, (60, 2))
    embedded = []
    for size in (SMALL, 2**30):
        points = torch.cat((torch.zeros(60, 1).long(), cells), 1)
        points[:, 1] += size - 2 * HEIGHT
        embedded.append(stem(points, torch.ones(60, 1), (size, HEIGHT), 1).values)
    assert torch.equal(*embedded)


def test_boxes_in_too_narrow_a_dtype_are_refused() -> None:
    detector = float_detector(DenoisingQueryGenerator(EMBED, CLASSES, 1))
    pyramid, targets, _ = make_scene(2**24)
    narrow = targets._replace(boxes=targets.boxes.float())
    with refused("targets.boxes", "float32"):
        detector(pyramid, narrow)
    with refused("targets.boxes", "float32"):
        SetCriterion()(detector(pyramid, targets), narrow)
    with refused("queries.boxes", "float32"):
        detector.decoder(make_queries((3,), dtype=torch.float32), pyramid)
    small = make_scene(SMALL)[0]
    with refused("queries.boxes", "bfloat16"):
        queries = make_queries((3,), dtype=torch.float32)
        detector.decoder(queries._replace(boxes=queries.boxes.bfloat16()), small)


@pytest.mark.parametrize("shift", [2.0**-20, 1.0])
def test_noise_of_two_objects_at_large_coordinates_differs(shift: float) -> None:
    boxes = torch.tensor([[2.0**30, 5, 4, 4]] * 2, dtype=torch.float64)
    boxes[1, 0] += shift
    targets = Targets(boxes, torch.tensor([0, 0]), torch.tensor([0, 2]))
    noisy = make_denoising_queries(targets, 1, n_classes=1).boxes
    assert (noisy[0, 2:] != noisy[1, 2:]).all()  # sizes, which are equal without noise


def normalized(n: int) -> Targets:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(n, 4, generator=generator)
    return Targets(boxes, torch.zeros(n).long(), torch.tensor([0, n]))


@pytest.fixture
def no_warning_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vicinal.windows._warned_normalized", set())


@pytest.mark.usefixtures("no_warning_yet")
def test_boxes_in_units_of_the_map_cause_one_warning() -> None:
    detector, criterion = float_detector(), SetCriterion()
    pyramid = make_scene(SMALL)[0]
    output, queries = detector(pyramid), make_queries((16,), dtype=torch.float32)
    criterion(output, normalized(15))  # too few to tell
    with pytest.warns(UserWarning, match=r"targets\.boxes"):
        criterion(output, normalized(16))
    criterion(output, normalized(16))  # once is enough
    detector.decoder(queries._replace(boxes=normalized(16).boxes), pyramid)


@pytest.mark.usefixtures("no_warning_yet")
def test_queries_in_units_of_the_map_cause_one_warning() -> None:
    detector, pyramid = float_detector(), make_scene(SMALL)[0]
    given = make_queries((16,), dtype=torch.float32)._replace(boxes=normalized(16).boxes)
    with pytest.warns(UserWarning, match=r"queries\.boxes"):
        detector.decoder(given, pyramid)
    detector.decoder(given, pyramid)


@pytest.mark.usefixtures("no_warning_yet")
def test_boxes_on_a_map_of_one_cell_cause_no_warning() -> None:
    coordinates = torch.zeros(1, 4).long()
    pyramid = FeaturePyramid(torch.randn(1, EMBED), coordinates, ((1, 1), (1, 1)), 1)
    SetCriterion()(float_detector()(pyramid), normalized(16))
