"""Reference points: queries that attend from several places in their boxes."""

from typing import Any

import pytest
import torch
from detr_scenes import (
    CLASSES,
    EMBED,
    HEADS,
    make_block,
    make_pyramid,
    make_queries,
    perturbed,
    refused,
)
from problems import assert_close
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseDeformableAttention
from vicinal.detr import (
    Decoder,
    DecoderLayer,
    FeedForward,
    ObjectQueries,
    QuerySelfAttention,
    ReferencePoints,
)

QUERIES, POINTS = (4, 0, 6), (30, 12, 9)
CORNERS = [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]


def make_layer(
    position_dim: int = 2, points: Any = None, attention: nn.Module | None = None
) -> DecoderLayer:
    return DecoderLayer(
        QuerySelfAttention(EMBED, HEADS, position_dim),
        make_block(position_dim) if attention is None else attention,
        FeedForward(EMBED, 2 * EMBED),
        reference_points=ReferencePoints(EMBED, position_dim, points),
    )


def by_hand(layer: Any, queries: ObjectQueries, pyramid: FeaturePyramid) -> Tensor:
    """Each reference point on its own, with a plan of its own."""
    x = layer.self_attention(queries)
    centers, sizes = queries.boxes.chunk(2, 1)
    found = []
    for position, embedding in zip(
        layer.reference_points.relative_positions, layer.reference_points.embeddings, strict=True
    ):
        given = x + embedding
        attended = layer.cross_attention(
            given,
            centers + torch.tensor(position, dtype=torch.float64) * sizes,
            queries.offsets,
            pyramid,
            query_level_indices=queries.levels,
        )
        found.append(attended - given)
    out: Tensor = layer.feed_forward(x + layer.reference_points.join(torch.cat(found, 1)))
    return out


@pytest.mark.parametrize(
    ("position_dim", "points"), [(1, None), (2, None), (3, None), (2, CORNERS)]
)
def test_matches_its_points_by_hand(position_dim: int, points: Any) -> None:
    layer = perturbed(make_layer(position_dim, points))
    queries, pyramid = make_queries(QUERIES, position_dim), make_pyramid(POINTS, position_dim)
    leaves = [queries.embeddings, queries.boxes, *layer.parameters()]
    out, expected = layer(queries, pyramid), by_hand(layer, queries, pyramid)
    assert_close(out, expected, 1e-12)
    weights = torch.randn_like(out)
    grads, wanted = (torch.autograd.grad((x * weights).sum(), leaves) for x in (out, expected))
    for grad, other in zip(grads, wanted, strict=True):
        assert other.any()
        assert_close(grad, other, 1e-12 * max(1.0, float(other.abs().max())))


def test_points_lie_at_the_center_and_the_sides() -> None:
    boxes = torch.tensor([[5.0, 8.0, 4.0, 2.0], [1.0, 2.0, 1.0, 6.0]], dtype=torch.float64)
    queries = ObjectQueries(
        torch.zeros(2, EMBED, dtype=torch.float64),
        boxes,
        torch.tensor([1, 0]),
        torch.tensor([0, 1, 1, 2]),
        torch.tensor([0, 3]),
    )
    points = ReferencePoints(EMBED).double()
    positions, offsets, levels = points.placement(queries)
    first, second = positions.split(5)
    assert first.tolist() == [[5, 8], [3, 8], [7, 8], [5, 7], [5, 9]]
    assert second.tolist() == [[1, 2], [0.5, 2], [1.5, 2], [1, -1], [1, 5]]
    assert offsets.tolist() == [0, 5, 5, 10]
    assert levels is not None
    assert levels.tolist() == [1] * 5 + [0] * 5
    assert torch.equal(points.embed(queries.embeddings), points.embeddings.repeat(2, 1))


def test_positions_are_exact_in_any_dtype_and_survive_other_devices() -> None:
    """They are no tensors of the module, which `to_empty` and casts would change."""
    thirds = [[1 / 3, -1 / 3]]
    points = ReferencePoints(EMBED, 2, thirds).half().to("meta").to_empty(device="cpu").double()
    points.reset_parameters()
    boxes = torch.tensor([[0.0, 0, 1, 1]], dtype=torch.float64)
    queries = make_queries((1,))._replace(boxes=boxes)
    assert points.placement(queries).positions.tolist() == thirds
    assert "relative_positions=[[0.33" in repr(points)


def test_a_layer_takes_its_plan_again() -> None:
    layer = perturbed(make_layer())
    queries, pyramid = make_queries(QUERIES), make_pyramid(POINTS)
    bare = queries._replace(embeddings=torch.empty(sum(QUERIES), 0))  # not needed for a plan
    plan = layer.make_plan(bare, pyramid)
    assert plan.n_queries == 5 * sum(QUERIES)
    assert torch.equal(layer(queries, pyramid, plan), layer(queries, pyramid))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_points_follow_the_boxes_from_layer_to_layer(checkpoint: bool) -> None:
    layers = [make_layer() for _ in range(2)]
    decoder = perturbed(Decoder(layers, EMBED, CLASSES, checkpoint=checkpoint))
    queries, pyramid = make_queries(QUERIES), make_pyramid(POINTS)
    predictions, given = decoder(queries, pyramid)
    for layer, norm, head, now, prediction in zip(
        layers, decoder.norms, decoder.heads, given, predictions, strict=True
    ):
        logits, boxes = head(norm(by_hand(layer, now, pyramid)), now.boxes)
        assert_close(prediction.logits, logits, 1e-9)
        assert_close(prediction.boxes, boxes, 1e-9)
    predictions[-1].boxes.sum().backward()
    assert all(p.grad is not None for p in layers[1].parameters())


def test_points_beyond_a_seam_lie_on_the_other_side() -> None:
    """A scene moved along a periodic axis gives the same numbers."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(0, 16, (60, 2), generator=generator)
    values = torch.randn(60, EMBED, generator=generator, dtype=torch.float64)
    boxes = torch.tensor([[2.3, 8.0, 6.0, 4.0], [13.2, 3.0, 5.0, 3.0]], dtype=torch.float64)
    layer = perturbed(make_layer())

    def run(shift: int) -> Tensor:
        rows = torch.cat((torch.zeros(60, 1), (cells[:, :1] + shift) % 16, cells[:, 1:]), 1)
        pyramid = FeaturePyramid.from_points(
            rows.long(), values, (16, 16), 1, strides=(1, 2), periodic_axes=(0,)
        )
        moved = boxes.clone()
        moved[:, 0] = (boxes[:, 0] + shift) % 16
        queries = ObjectQueries(
            torch.ones(2, EMBED, dtype=torch.float64),
            moved,
            torch.zeros(2, dtype=torch.int64),
            torch.tensor([0, 2]),
            torch.tensor([0, 1]),  # apart, since self-attention sees distances within the map
        )
        out: Tensor = layer(queries, pyramid)
        return out

    expected = run(6)
    for shift in (0, 2, 14):
        assert_close(run(shift), expected, 1e-12)


@pytest.mark.parametrize(
    ("n_queries", "n_points"), [((), ()), ((0,), (0,)), ((3, 1), (0, 0)), ((0, 2), (4, 0))]
)
def test_few_or_no_queries_and_points(
    n_queries: tuple[int, ...], n_points: tuple[int, ...]
) -> None:
    layer = perturbed(make_layer())
    queries, pyramid = make_queries(n_queries), make_pyramid(n_points)
    out = layer(queries, pyramid)
    assert_close(out, by_hand(layer, queries, pyramid), 1e-12)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_deformable_attention_samples_around_them() -> None:
    layer = perturbed(make_layer(attention=SparseDeformableAttention(EMBED, HEADS, 2, 2)))
    queries, pyramid = make_queries(QUERIES), make_pyramid(POINTS)
    assert_close(layer(queries, pyramid), by_hand(layer, queries, pyramid), 1e-12)


def test_parameters_are_drawn_again() -> None:
    points = ReferencePoints(64, 3)
    assert list(points.state_dict()) == ["embeddings", "join.weight", "join.bias"]
    with torch.no_grad():
        for parameter in points.parameters():
            parameter.fill_(7)
    points.reset_parameters()
    assert 0.05 < points.embeddings.std() < 0.2
    assert points.join.weight.abs().max() <= (7 * 64) ** -0.5
    assert not points.join.bias.any()


@pytest.mark.parametrize(
    "positions",
    [[], [0.0, 0.5], [[0.0]], [[0.0, float("nan")]], [[1e39, 0]], "ab", 3, torch.zeros(2)],
)
def test_positions_that_are_none_are_refused(positions: Any) -> None:
    with refused("relative_positions"):
        ReferencePoints(EMBED, 2, positions)


def test_invalid_arguments_are_refused_by_name() -> None:
    for sizes, name in (((0,), "embed_dim"), ((EMBED, 0), "position_dim")):
        with refused(name):
            ReferencePoints(*sizes)
    queries = make_queries(QUERIES)
    with refused("queries.boxes"):
        ReferencePoints(EMBED, 3).placement(queries)
    points = ReferencePoints(EMBED)
    with refused("embeddings"):
        points.embed(queries.embeddings[:, :3])
    for attended in (None, torch.ones(1, EMBED), torch.ones(())):
        with refused("attend(...)"):
            points(queries.embeddings, lambda _, given=attended: given)  # type: ignore[misc]
    with refused("reference_points"):
        DecoderLayer(nn.Identity(), nn.Identity(), nn.Identity(), reference_points=CORNERS)  # type: ignore[arg-type]
