"""What parts of a detector take, and how they are reset."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from detr_scenes import (
    CLASSES,
    EMBED,
    PREDICTIONS,
    TARGETS,
    array,
    as_array,
    gradients,
    integer,
    make_decoder,
    make_detector,
    make_pyramid,
    make_queries,
    make_targets,
    perturbed,
    refused,
)
from torch import Tensor, nn

from vicinal.detr import (
    Decoder,
    DecoderLayer,
    DenoisingQueryGenerator,
    DetectionHead,
    DetectionLoss,
    Detector,
    Encoder,
    EncoderLayer,
    FeedForward,
    HungarianMatcher,
    Matches,
    ObjectQueries,
    QuerySelection,
    QuerySelfAttention,
    SetCriterion,
    Targets,
    assign_points_to_boxes,
    box_period,
    boxes_to_corners,
    check_predictions,
    check_targets,
    corners_to_boxes,
    encode_boxes,
    generalized_iou,
    iou,
    make_denoising_queries,
    mean_object_count,
    relative_l1,
    select_detections,
    sigmoid_focal_loss,
    sum_losses,
    varifocal_loss,
)


def arrays(value: Any) -> Any:
    """A named tuple with a NumPy array for each tensor."""
    parts = (part.detach().numpy() if isinstance(part, Tensor) else part for part in value)
    return type(value)(*parts)


def test_losses_and_matches_take_arrays() -> None:
    predictions, targets = arrays(PREDICTIONS), arrays(TARGETS)
    matches = HungarianMatcher()(PREDICTIONS, TARGETS)
    assert all(map(torch.equal, HungarianMatcher()(predictions, targets), matches))
    expected = DetectionLoss()(PREDICTIONS, TARGETS, matches, 4)
    assert DetectionLoss()(predictions, targets, arrays(matches), integer(4)) == expected
    positions, offsets = torch.rand(5, 2), torch.tensor([0, 2, 5])
    assignment = assign_points_to_boxes(positions, offsets, TARGETS)
    ours = assign_points_to_boxes(array(positions), array(offsets), targets)
    assert torch.equal(ours, assignment)
    assert all(
        map(
            torch.equal,
            Matches.from_assignment(array(assignment)),
            Matches.from_assignment(assignment),
        )
    )
    found = select_detections(predictions, integer(2))
    assert all(map(torch.equal, found, select_detections(PREDICTIONS, 2)))
    assert all(map(torch.equal, check_predictions(predictions), PREDICTIONS))
    assert all(map(torch.equal, check_targets(targets, 2, CLASSES, 2), TARGETS))
    logits, labels = torch.randn(4, 3), torch.tensor([0, -1, 2, 1])
    focal = sigmoid_focal_loss(array(logits), array(labels))
    assert torch.equal(focal, sigmoid_focal_loss(logits, labels))
    quality = torch.rand(4)
    vari = varifocal_loss(array(logits), array(labels), array(quality))
    assert torch.equal(vari, varifocal_loss(logits, labels, quality))
    corners = boxes_to_corners(array(TARGETS.boxes))
    assert torch.equal(corners_to_boxes(*arrays(Pair(*corners))), corners_to_boxes(*corners))


class Pair(tuple):  # type: ignore[type-arg]
    """Two arrays, built as a named tuple is."""

    def __new__(cls, *parts: Any) -> "Pair":
        return super().__new__(cls, parts)


def test_a_decoder_and_a_denoiser_take_arrays() -> None:
    decoder, queries, pyramid = (
        perturbed(make_decoder()),
        make_queries((3, 2)),
        make_pyramid((9, 5)),
    )
    expected, _ = decoder(queries, pyramid)
    got, _ = decoder(arrays(queries), pyramid)
    assert torch.equal(got[-1].logits, expected[-1].logits)
    assert torch.equal(got[-1].boxes, expected[-1].boxes)
    targets = make_targets((2, 1))
    ours, theirs = (
        make_denoising_queries(
            given,
            integer(2),
            label_noise=as_array(0.5)[()],
            n_classes=integer(CLASSES),
            generator=torch.Generator().manual_seed(0),
        )
        for given in (arrays(targets), targets)
    )
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    "make",
    [
        lambda n: FeedForward(n(EMBED), n(12)),
        lambda n: DetectionHead(n(EMBED), n(3), n(2)),
        lambda n: QuerySelfAttention(n(EMBED), n(2), n(2)),
        lambda n: QuerySelection(n(EMBED), n(3), n(5), as_array([0, 1]), n(2)),
        lambda n: DenoisingQueryGenerator(n(EMBED), n(3), n(2)),
    ],
)
def test_numpy_integers_are_sizes(make: Callable[[Any], nn.Module]) -> None:
    shapes = [
        {name: value.shape for name, value in make(number).state_dict().items()}
        for number in (int, integer)
    ]
    assert shapes[0] == shapes[1]


def test_images_that_are_missing_at_the_end_have_no_objects() -> None:
    whole, short = make_targets((2, 1, 0, 0)), make_targets((2, 1))
    padded = check_targets(short, 2, CLASSES, 4)
    assert all(map(torch.equal, padded, whole))
    detector = perturbed(make_detector(denoiser=DenoisingQueryGenerator(EMBED, CLASSES, 1)))
    pyramid, losses = make_pyramid((9, 7, 5, 3)), []
    for targets in (whole, short):
        torch.manual_seed(0)
        losses.append(SetCriterion()(detector(pyramid, targets), targets))
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())


def test_queries_have_a_placement() -> None:
    queries = make_queries((3, 0, 2))
    positions, offsets, levels = queries.placement
    assert torch.equal(positions, queries.boxes[:, :2])
    assert offsets is queries.offsets
    assert levels is queries.levels


def parents_first(module: nn.Module) -> Iterator[nn.Module]:
    return module.modules()


def children_first(module: nn.Module) -> Iterator[nn.Module]:
    return reversed(list(module.modules()))


@pytest.mark.parametrize("order", [parents_first, children_first])
def test_resetting_modules_in_any_order_restores_the_initial_scores_and_boxes(
    order: Callable[[nn.Module], Iterator[nn.Module]],
) -> None:
    detector = make_detector()
    keys = list(detector.state_dict())
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.fill_(7.0)
    for module in order(detector):
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    assert list(detector.state_dict()) == keys
    heads = [module for module in detector.modules() if isinstance(module, DetectionHead)]
    assert len(heads) == 3
    boxes = torch.rand(5, 4) + 1
    for head in heads:
        logits, refined = head(torch.zeros(5, EMBED), boxes)
        assert torch.equal(refined, boxes)
        assert torch.allclose(logits.sigmoid(), torch.tensor(0.01))
        assert head.classes.weight.std() < 1
    assert not any((parameter == 7).any() for parameter in detector.parameters())


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_a_step_runs_with_deterministic_algorithms() -> None:
    detector = perturbed(make_detector(denoiser=DenoisingQueryGenerator(EMBED, CLASSES, 1)))
    pyramid, targets = make_pyramid((9, 0, 7)), make_targets((2, 1, 1))
    sum_losses(SetCriterion()(detector(pyramid, targets), targets)).backward()
    for name, grad in gradients(detector).items():
        assert grad is not None, name
        assert grad.isfinite().all(), name
        assert grad.any(), name


def test_messages_show_shapes_instead_of_numbers() -> None:
    boxes = torch.full((100, 3), 0.123456)
    wrong: list[Callable[[], Any]] = [
        lambda: boxes_to_corners(boxes),
        lambda: check_targets(Targets(boxes, boxes, boxes), None, None, None),
        lambda: perturbed(make_decoder())(
            ObjectQueries(boxes.double(), boxes, boxes, boxes), make_pyramid((5,))
        ),
        lambda: QuerySelection(EMBED, 3, 5, levels=boxes),  # type: ignore[arg-type]
        lambda: DetectionLoss()(PREDICTIONS, TARGETS, boxes, 1),  # type: ignore[arg-type]
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"\[100, 3\]") as error:
            call()
        assert "0.1234" not in str(error.value)


# ------------------------------------------------------------------------------ what is refused

SPARSE_BOXES = torch.ones(3, 4).to_sparse()
LABELS = torch.zeros(3, dtype=torch.int64)


def _encoder_layer(**parts: Any) -> Any:
    return EncoderLayer(**({"attention": nn.Identity(), "feed_forward": nn.Identity()} | parts))


def _decoder_layer(**parts: Any) -> Any:
    names = "self_attention", "cross_attention", "feed_forward"
    return DecoderLayer(**({name: nn.Identity() for name in names} | parts))


def _detector(**parts: Any) -> Any:
    names = "encoder", "selection", "decoder"
    return Detector(**({name: nn.Identity() for name in names} | parts))


def _loss(n_objects: Any) -> Any:
    matches = Matches(torch.tensor([0]), torch.tensor([0]))
    return DetectionLoss()(PREDICTIONS, TARGETS, matches, n_objects)


REFUSED: list[tuple[Callable[..., Any], str, list[Any]]] = [
    (lambda x: box_period(x), "pyramid", [None, "x", torch.ones(2)]),
    (lambda x: iou(x, torch.ones(3, 4)), "a", [SPARSE_BOXES]),
    (lambda x: encode_boxes(x, torch.ones(3, 4)), "boxes", [SPARSE_BOXES]),
    (lambda x: iou(torch.ones(3, 4), x), "b", [torch.ones(2, 4), torch.ones(2, 1, 2, 4)]),
    (lambda x: relative_l1(torch.ones(3, 4), x), "targets", [torch.ones(2, 4)]),
    (
        lambda x: generalized_iou(torch.ones(3, 4), torch.ones(3, 4), period=x),
        "period",
        [[10**400, 1], [True, 1], [0, 1], [1], 3, torch.ones(2, device="meta")],
    ),
    (lambda x: _encoder_layer(attention=x), "attention", [None, 3]),
    (lambda x: _encoder_layer(feed_forward=x), "feed_forward", [None, "x"]),
    (lambda x: _encoder_layer()(*[torch.ones(1)] * 4), "pyramid", [None]),
    (lambda x: Encoder(x, 8), "layers", [None, [], 3, "x", [3]]),
    (lambda x: Decoder(x, 8, 3), "layers", [None, [], 3, "x", [3], [_encoder_layer()]]),
    (
        lambda x: perturbed(make_decoder(1))(make_queries((2,), dtype=x), make_pyramid((3,))),
        "queries.embeddings",
        [torch.float32],
    ),
    (
        lambda x: QuerySelection(EMBED, 3, 2)(make_pyramid((3,), dtype=x)),
        "pyramid.values",
        [torch.float64, torch.float16],
    ),
    (lambda x: _decoder_layer(self_attention=x), "self_attention", [None, 3]),
    (lambda x: _decoder_layer(cross_attention=x), "cross_attention", [None, 3]),
    (lambda x: _decoder_layer()(x, make_pyramid((3,))), "queries", [None, (1, 2)]),
    (lambda x: _decoder_layer()(make_queries((2,)), x), "pyramid", [None, torch.ones(2)]),
    (lambda x: _detector(encoder=x), "encoder", [None, "x"]),
    (lambda x: _detector(denoiser=x), "denoiser", [3, "x"]),
    (lambda x: DenoisingQueryGenerator(8, 3, label_noise=x), "label_noise", [-1, 2, None, True]),
    (lambda x: DenoisingQueryGenerator(8, 3, box_noise=x), "box_noise", [-1, 1, "x", math.nan]),
    (lambda x: DenoisingQueryGenerator(8, 3, box_size=x), "box_size", [0, math.inf, 10**400]),
    (
        lambda x: DenoisingQueryGenerator(EMBED, 3)(make_queries((2,)), TARGETS, x),
        "pyramid",
        [None, "x"],
    ),
    (
        lambda x: make_denoising_queries(TARGETS, 1, n_classes=CLASSES, generator=x),
        "generator",
        [3, "x"],
    ),
    (
        lambda x: sigmoid_focal_loss(torch.ones(3, 2), LABELS, alpha=x),
        "alpha",
        [-1, 2, "x", None, math.nan],
    ),
    (
        lambda x: varifocal_loss(torch.ones(3, 2), LABELS, torch.ones(3), gamma=x),
        "gamma",
        [-1, "x", None, math.inf],
    ),
    (lambda x: check_targets(TARGETS, x, None, None), "position_dim", ["x", 1.5, -1]),
    (lambda x: check_targets(TARGETS, None, x, None), "n_classes", ["x", 1.5, True]),
    (lambda x: check_targets(TARGETS, None, None, x), "batch_size", ["x", 1.5, -1]),
    (_loss, "n_objects", ["x", None, 0, -1, math.nan, torch.ones(2), torch.zeros(())]),
    (lambda x: SetCriterion(matcher=x), "matcher", [3, "x"]),
    (lambda x: SetCriterion(candidate_loss=x), "candidate_loss", [3, "x"]),
    (lambda x: sum_losses(x), "losses", [{}, None, [1.0], {"a": 1.0}, {"a": torch.ones(2)}]),
    (
        lambda x: mean_object_count(x, torch.device("cpu")),
        "n",
        ["x", None, -1, math.nan, torch.ones(2)],
    ),
    (
        lambda x: mean_object_count(1, torch.device("cpu"), copies=x),
        "copies",
        ["x", None, 0, 1.5],
    ),
]


@pytest.mark.parametrize(("call", "argument", "values"), REFUSED)
def test_refusals(call: Callable[..., Any], argument: str, values: list[Any]) -> None:
    for value in values:
        with refused(argument):
            call(value)
