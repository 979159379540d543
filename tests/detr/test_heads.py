"""Detection heads and feed-forward parts: what they begin with, and against formulas by hand."""

import math
from typing import Any

import pytest
import torch
from detr_scenes import CLASSES, EMBED, make_queries, refused, stir
from problems import assert_close
from torch import Tensor

from vicinal.detr import DetectionHead, FeedForward


def start(position_dim: int = 2) -> tuple[DetectionHead, Tensor, Tensor]:
    queries = make_queries([40], position_dim)
    head = DetectionHead(EMBED, CLASSES, position_dim).double()
    return head, queries.embeddings.detach(), queries.boxes.detach()


@pytest.mark.parametrize("position_dim", [1, 2, 3])
def test_a_head_begins_with_the_boxes_it_is_given_and_scores_of_a_hundredth(
    position_dim: int,
) -> None:
    head, embeddings, boxes = start(position_dim)
    logits, refined = head(embeddings, boxes)
    assert torch.equal(refined, boxes)
    assert logits.shape == (40, CLASSES)
    assert 0.005 < float(logits.detach().sigmoid().median()) < 0.02
    assert_close(head(0 * embeddings, boxes)[0].sigmoid(), torch.full_like(logits, 0.01), 1e-6)


def test_reset_parameters_draws_anew_what_a_head_begins_with() -> None:
    head, embeddings, boxes = start()
    head.reset_parameters()
    before = {name: x.clone() for name, x in head.state_dict().items()}
    stir(head)
    head.reset_parameters()
    assert torch.equal(head(embeddings, boxes)[1], boxes)
    assert_close(head.classes.bias, torch.full_like(head.classes.bias, -math.log(99)), 1e-6)
    constant = {"classes.bias", "box.4.weight", "box.4.bias"}
    for name, x in head.state_dict().items():
        assert torch.equal(x, before[name]) == (name in constant), name


def test_a_head_moves_boxes_by_shares_of_their_size() -> None:
    head, embeddings, boxes = start(3)
    stir(head)
    logits, refined = head(embeddings, boxes)
    deltas = head.box(embeddings)
    assert_close(logits, embeddings @ head.classes.weight.T + head.classes.bias, 1e-12)
    for axis in range(3):
        center, size = boxes[:, axis], boxes[:, 3 + axis]
        assert_close(refined[:, axis], center + deltas[:, axis] * size, 1e-12)
        assert_close(refined[:, 3 + axis], size * deltas[:, 3 + axis].exp(), 1e-12)


def test_a_head_of_far_boxes_keeps_their_dtype_under_autocast() -> None:
    head, embeddings, boxes = start()
    head, boxes = head.float(), boxes.float() + torch.tensor([1000.25, 0, 0, 0])
    with torch.autocast("cpu", torch.bfloat16):
        _, refined = head(embeddings.float(), boxes)
    assert refined.dtype == torch.float32
    assert torch.equal(refined, boxes)


def test_a_head_of_nothing() -> None:
    head, embeddings, boxes = start()
    logits, refined = head(embeddings[:0], boxes[:0])
    assert logits.shape == (0, CLASSES)
    assert refined.shape == (0, 4)


@pytest.mark.parametrize("argument", ["embed_dim", "n_classes", "position_dim"])
@pytest.mark.parametrize("wrong", [0, 1.5])
def test_sizes_of_a_head_that_cannot_be_are_refused(argument: str, wrong: Any) -> None:
    sizes: dict[str, Any] = {"embed_dim": EMBED, "n_classes": CLASSES, "position_dim": 2}
    with refused(argument):
        DetectionHead(**sizes | {argument: wrong})


def test_embeddings_and_boxes_that_do_not_fit_a_head_are_refused() -> None:
    head, embeddings, boxes = start()
    with refused("embeddings"):
        head(embeddings[:, 1:], boxes)
    with refused("boxes"):
        head(embeddings, boxes[1:])
    with refused("boxes"):
        head(embeddings, boxes[:, 1:])
    with refused("boxes"):
        head(embeddings, boxes.long())


@pytest.mark.parametrize("norm_first", [True, False])
def test_feed_forward_is_two_maps_with_a_gelu_between_and_a_residual(norm_first: bool) -> None:
    part = FeedForward(EMBED, 12, norm_first=norm_first).double()
    stir(part)
    x = torch.randn(5, EMBED, dtype=torch.float64)
    first, second = part.layers[0], part.layers[3]
    hidden = first(part.norm(x) if norm_first else x)
    out = x + second(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)
    assert_close(part(x), out if norm_first else part.norm(out), 1e-12)


def test_feed_forward_is_four_times_as_wide_within_and_drops_in_training_alone() -> None:
    part, x = FeedForward(EMBED, dropout=0.5), torch.randn(5, EMBED)
    assert part.layers[0].out_features == 4 * EMBED
    assert not torch.equal(part(x), part(x))
    part.eval()
    assert torch.equal(part(x), part(x))


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("embed_dim", {"embed_dim": 0}),
        ("hidden_dim", {"hidden_dim": 0}),
        ("hidden_dim", {"hidden_dim": 2.5}),
        ("dropout", {"dropout": -0.1}),
    ],
)
def test_options_of_feed_forward_that_cannot_be_are_refused(
    argument: str, options: dict[str, Any]
) -> None:
    with refused(argument):
        FeedForward(**{"embed_dim": EMBED} | options)


def test_feed_forward_refuses_another_width() -> None:
    with refused("x"):
        FeedForward(EMBED)(torch.zeros(2, EMBED + 1))
