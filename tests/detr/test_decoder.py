"""The decoder: its layers one after another, boxes that move and plans that follow them."""

import math
from typing import Any

import pytest
import torch
from detr_scenes import (
    CLASSES,
    EMBED,
    HEADS,
    SavedBytes,
    gradients,
    make_block,
    make_decoder,
    make_pyramid,
    make_queries,
    perturbed,
    refused,
)
from problems import assert_close
from torch import Tensor
from torch.autograd import forward_ad

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock, Window
from vicinal.detr import (
    Decoder,
    DecoderLayer,
    FeedForward,
    ObjectQueries,
    Predictions,
    QuerySelfAttention,
)

QUERIES, POINTS = (4, 0, 6), (30, 12, 0)


def by_hand(decoder: Any, queries: ObjectQueries, pyramid: Any) -> list[Predictions]:
    """All layers spelled out, each with a plan of its own."""
    embeddings, boxes, levels, offsets, groups = queries
    dim, predictions = pyramid.position_dim, []
    for layer, norm, head in zip(decoder.layers, decoder.norms, decoder.heads, strict=True):
        embeddings = embeddings + decoder.sizes(boxes[:, dim:].log() / math.log(2))
        now = ObjectQueries(embeddings, boxes, levels, offsets, groups)
        embeddings = layer.cross_attention(
            layer.self_attention(now), boxes[:, :dim], offsets, pyramid, query_level_indices=levels
        )
        embeddings = layer.feed_forward(embeddings)
        logits, deltas = head.classes(norm(embeddings)), head.box(norm(embeddings))
        center, size = boxes.chunk(2, 1)
        moved = (center + deltas[:, :dim] * size, size * deltas[:, dim:].exp())
        predictions.append(Predictions(logits, torch.cat(moved, 1), offsets))
        boxes = predictions[-1].boxes.detach()
    return predictions


@pytest.mark.parametrize("position_dim", [1, 2, 3])
def test_matches_its_layers_by_hand(position_dim: int) -> None:
    decoder = perturbed(make_decoder(3, position_dim))
    queries, pyramid = make_queries(QUERIES, position_dim), make_pyramid(POINTS, position_dim)
    predictions, _ = decoder(queries, pyramid)
    expected = by_hand(decoder, queries, pyramid)
    assert len(predictions) == 3
    for ours, theirs in zip(predictions, expected, strict=True):
        assert ours.logits.shape == (10, CLASSES)
        assert_close(ours.logits, theirs.logits, 1e-9)
        assert_close(ours.boxes, theirs.boxes, 1e-9)
        assert torch.equal(ours.offsets, queries.offsets)


def test_a_layer_takes_its_plan_again() -> None:
    layer: Any = perturbed(make_decoder(1)).layers[0]
    queries, pyramid = make_queries(QUERIES), make_pyramid(POINTS)
    plan = layer.make_plan(queries, pyramid)
    assert torch.equal(layer(queries, pyramid, plan), layer(queries, pyramid))
    with refused("queries", "None"):
        layer.make_plan(None, pyramid)
    with refused("pyramid", "None"):
        layer.make_plan(queries, None)


def test_every_layer_has_a_plan_where_the_boxes_are(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = perturbed(make_decoder(3))
    asked: list[tuple[int, Tensor]] = []
    for index, layer in enumerate(decoder.layers):
        attention: Any = layer.cross_attention

        def spy(
            positions: Tensor,
            *rest: Any,
            index: int = index,
            original: Any = attention.make_plan,
        ) -> Any:
            asked.append((index, positions))
            return original(positions, *rest)

        monkeypatch.setattr(attention, "make_plan", spy)
    predictions, given = decoder(make_queries(QUERIES), make_pyramid(POINTS))
    assert [index for index, _ in asked] == [0, 1, 2]
    for (_, positions), queries in zip(asked, given, strict=True):
        assert torch.equal(positions, queries.positions)
    for before, after in zip(predictions, given[1:], strict=False):
        assert torch.equal(before.boxes, after.boxes)
    assert (asked[0][1] - asked[1][1]).abs().amin() > 0
    assert (asked[1][1] - asked[2][1]).abs().amin() > 0


def test_causal_windows_end_with_the_own_cells_of_the_queries() -> None:
    """The own cell is that of a query's level; the layers' plans are made for these levels."""
    window = Window((3, 2), causal=(False, True))
    decoder = make_decoder(
        2, attention=lambda: SparseNeighborhoodAttentionBlock(EMBED, HEADS, 2, (window, window))
    )
    queries, pyramid = make_queries((20, 10, 0)), make_pyramid(POINTS)
    predictions, _ = perturbed(decoder)(queries, pyramid)
    for ours, theirs in zip(predictions, by_hand(decoder, queries, pyramid), strict=True):
        assert_close(ours.logits, theirs.logits, 1e-9)
        assert_close(ours.boxes, theirs.boxes, 1e-9)


@pytest.mark.parametrize("twice", [True, False])
def test_gradients_of_boxes_reach_the_head_before_alone(twice: bool) -> None:
    decoder = perturbed(make_decoder(3))
    decoder.look_forward_twice = twice
    predictions, given = decoder(make_queries(QUERIES), make_pyramid(POINTS))
    assert not any(queries.boxes.requires_grad for queries in given[1:])
    last = predictions[2].boxes.sum() + predictions[2].logits.sum()
    for index, head in enumerate(decoder.heads):
        box: Any = head.box
        grads = torch.autograd.grad(
            last, list(box.parameters()), retain_graph=True, allow_unused=True
        )
        reached = index == 2 or (twice and index == 1)
        assert all((grad is not None and bool(grad.any())) == reached for grad in grads)
    first_layer: Any = decoder.layers[0]
    for grad in torch.autograd.grad(last, list(first_layer.parameters())):
        assert grad.isfinite().all()
        assert grad.any()


def test_forward_mode_has_the_derivative_of_reverse_mode() -> None:
    decoder = perturbed(make_decoder(2))
    queries, pyramid = make_queries(QUERIES), make_pyramid(POINTS)
    queries = queries._replace(embeddings=queries.embeddings.detach(), boxes=queries.boxes.detach())
    name = "heads.0.box.4.weight"  # no compiled kernel comes after it
    weight = decoder.get_parameter(name)

    def boxes(value: Tensor) -> Tensor:
        out = torch.func.functional_call(decoder, {name: value}, (queries, pyramid))
        total: Tensor = out[0][1].boxes.square().sum()
        return total

    tangent = torch.randn_like(weight)
    (grad,) = torch.autograd.grad(boxes(weight), weight)
    ours: Tensor = torch.func.jvp(boxes, (weight.detach(),), (tangent,))[1]
    assert ours != 0
    assert_close(ours, (grad * tangent).sum(), 1e-9)
    with torch.no_grad(), forward_ad.dual_level():
        dual = boxes(forward_ad.make_dual(weight.detach(), tangent))
        assert_close(forward_ad.unpack_dual(dual).tangent, ours, 1e-9)


class Sigmoid(torch.nn.Module):
    """A head that refines boxes in another way."""

    def forward(self, embeddings: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return embeddings[:, :CLASSES], 20 * (boxes + embeddings[:, :4]).sigmoid()


@pytest.mark.parametrize("make_head", [None, Sigmoid])
@pytest.mark.parametrize("periodic_axes", [(), (1,)])
def test_gradients_are_as_if_a_head_had_got_boxes_with_their_gradient(
    make_head: type[Sigmoid] | None, periodic_axes: tuple[int, ...]
) -> None:
    """The chain rule, one link after another, for any head; wrapping adds a constant."""
    decoder = perturbed(make_decoder(3))
    if make_head is not None:
        decoder.heads[2] = make_head()
    inputs: list[Tensor] = []
    for head in decoder.heads:
        head.register_forward_hook(lambda module, arguments, out: inputs.append(arguments[0]))
    queries, flat = make_queries(QUERIES), make_pyramid(POINTS)
    pyramid = FeaturePyramid(
        flat.values, flat.coordinates, flat.level_shapes, len(POINTS), periodic_axes=periodic_axes
    )
    turned = queries.boxes + torch.tensor([0.0, 40.0 if periodic_axes else 0.0, 0.0, 0.0])
    predictions, given = decoder(queries._replace(boxes=turned), pyramid)
    weights = torch.randn_like(turned)
    parameters = list(decoder.heads[1].parameters())
    last = (predictions[2].boxes * weights).sum()
    ours = torch.autograd.grad(last, parameters, allow_unused=True)

    start = given[2].boxes.clone().requires_grad_()
    _, boxes = decoder.heads[2](inputs[-1].detach(), start)
    (by_start,) = torch.autograd.grad((boxes * weights).sum(), start)
    _, refined = decoder.heads[1](inputs[1].detach(), given[1].boxes)
    expected = torch.autograd.grad(refined, parameters, by_start, allow_unused=True)
    assert any(grad is not None and grad.any() for grad in expected)
    for grad, expected_grad in zip(ours, expected, strict=True):
        assert (grad is None) == (expected_grad is None)
        if grad is not None and expected_grad is not None:
            assert_close(grad, expected_grad, 1e-12)


def test_looking_forward_twice_changes_no_bit_of_the_predictions() -> None:
    decoder = perturbed(make_decoder(3))
    queries, pyramid = make_queries(QUERIES), make_pyramid(POINTS)
    twice, _ = decoder(queries, pyramid)
    decoder.look_forward_twice = False
    for ours, theirs in zip(twice, decoder(queries, pyramid)[0], strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.logits, theirs.logits)


def test_checkpointing_gives_the_same_bits_and_stores_less() -> None:
    plain = perturbed(make_decoder(3, dropout=0.2))
    again = make_decoder(3, checkpoint=True, dropout=0.2).double()
    again.load_state_dict(plain.state_dict())
    queries, pyramid = make_queries((25, 15)), make_pyramid((60, 40))
    outs, stored, inputs = [], [], []
    for decoder in (plain, again):
        values = pyramid.values.clone().requires_grad_()
        saved = SavedBytes()
        torch.manual_seed(2)
        with saved.counted():
            predictions, _ = decoder(queries, pyramid.with_values(values))
        out = torch.cat([torch.cat((p.logits, p.boxes), 1) for p in predictions])
        leaves = (values, queries.embeddings, *decoder.parameters())
        inputs.append(torch.autograd.grad(out.square().sum(), leaves))
        outs.append(out)
        stored.append(saved.nbytes)
    assert torch.equal(*outs)
    for ours, theirs in zip(*inputs, strict=True):
        assert torch.equal(ours, theirs)
    assert stored[1] < stored[0] / 2


@pytest.mark.parametrize(
    ("n_queries", "n_points"),
    [((), ()), ((0,), (0,)), ((0, 0), (5, 3)), ((3, 1), (0, 0)), ((1,), (1,)), ((0, 2), (4, 0))],
)
def test_few_or_no_queries_and_points(
    n_queries: tuple[int, ...], n_points: tuple[int, ...]
) -> None:
    decoder = perturbed(make_decoder(2))
    queries, pyramid = make_queries(n_queries), make_pyramid(n_points)
    predictions, given = decoder(queries, pyramid)
    for ours, theirs in zip(predictions, by_hand(decoder, queries, pyramid), strict=True):
        assert_close(ours.logits, theirs.logits, 1e-9)
        assert_close(ours.boxes, theirs.boxes, 1e-9)
    torch.stack([p.logits.sum() + p.boxes.sum() for p in predictions]).sum().backward()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(decoder).values())
    assert len(given) == 2


def test_queries_far_from_all_points_have_predictions() -> None:
    decoder = perturbed(make_decoder(2))
    queries, pyramid = make_queries((3, 2)), make_pyramid((40, 30))
    boxes = queries.boxes.detach().clone()
    boxes[:, :2] += 1e6
    predictions, _ = decoder(queries._replace(boxes=boxes), pyramid)
    assert all(p.logits.isfinite().all() and p.boxes.isfinite().all() for p in predictions)
    moved = pyramid.with_values(torch.randn_like(pyramid.values))
    others, _ = decoder(queries._replace(boxes=boxes), moved)
    assert torch.equal(predictions[-1].logits, others[-1].logits)


def test_groups_are_independent_in_all_layers() -> None:
    decoder = perturbed(make_decoder(3))
    queries, pyramid = make_queries((6,)), make_pyramid((40,))
    groups = torch.tensor([0, 0, 1, 0, 1, 1])
    queries = queries._replace(groups=groups)
    together, _ = decoder(queries, pyramid)
    for group in (0, 1):
        rows = (groups == group).nonzero().flatten()
        alone = ObjectQueries(
            queries.embeddings[rows],
            queries.boxes[rows],
            queries.levels[rows],
            torch.tensor([0, len(rows)]),
        )
        for ours, theirs in zip(together, decoder(alone, pyramid)[0], strict=True):
            assert_close(ours.logits[rows], theirs.logits, 1e-9)
            assert_close(ours.boxes[rows], theirs.boxes, 1e-9)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_points_may_have_another_width_than_the_queries(checkpoint: bool) -> None:
    layers = [
        DecoderLayer(
            QuerySelfAttention(EMBED, 2),
            make_block(point_dim=5, rotary=rotary, rope_axis_scales=(1.0, 3.0)),
            FeedForward(EMBED),
        )
        for rotary in (True, False)
    ]
    decoder = perturbed(Decoder(layers, EMBED, CLASSES, checkpoint=checkpoint))
    queries, pyramid = make_queries(QUERIES), make_pyramid(POINTS, embed_dim=5)
    pyramid = pyramid.with_values(pyramid.values.requires_grad_())
    predictions, _ = decoder(queries, pyramid)
    expected = by_hand(decoder, queries, pyramid)
    for ours, theirs in zip(predictions, expected, strict=True):
        assert_close(ours.logits, theirs.logits, 1e-9)
        assert_close(ours.boxes, theirs.boxes, 1e-9)
    grads = [
        torch.autograd.grad(parts[-1].logits.sum(), [queries.embeddings, pyramid.values])
        for parts in (predictions, expected)
    ]
    for left, right in zip(*grads, strict=True):
        assert_close(left, right, 1e-9)
    with refused("stacked_feature_maps"):
        decoder(queries, make_pyramid(POINTS))


def test_invalid_arguments_are_refused_by_name() -> None:
    with refused("layers"):
        Decoder([], EMBED, CLASSES)
    decoder, queries = make_decoder().double(), make_queries((2, 1))
    with refused("queries"):
        decoder(queries.embeddings, make_pyramid((5, 5)))  # type: ignore[arg-type]
    with refused("queries.boxes"):
        decoder(queries._replace(boxes=-queries.boxes), make_pyramid((5, 5)))
    with refused("pyramid"):
        decoder(queries, make_pyramid((5, 5)).values)  # type: ignore[arg-type]
    with refused("query_level_indices"):
        decoder(queries._replace(levels=queries.levels + 2), make_pyramid((5, 5)))


def test_images_without_queries_may_be_missing_at_the_end() -> None:
    decoder, queries = make_decoder().double(), make_queries((2, 1))
    predictions, _ = decoder(queries, make_pyramid((5, 5, 5)))
    assert all(part.logits.shape[0] == 3 for part in predictions)
