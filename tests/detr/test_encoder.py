"""The encoder: its layers one after another, on one plan, with and without checkpointing."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from detr_scenes import (
    EMBED,
    SavedBytes,
    gradients,
    make_block,
    make_encoder,
    make_pyramid,
    perturbed,
    refused,
    spans,
)
from problems import assert_close
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock, plan_neighborhoods
from vicinal.detr import Encoder, EncoderLayer, FeedForward

COUNTS = (20, 0, 7, 1)


def by_hand(encoder: Encoder, pyramid: FeaturePyramid, levels: tuple[int, ...] = (0, 1)) -> Tensor:
    """Attention and feed-forward of every layer, each with a plan of its own.

    Points of other levels keep their values.
    """
    is_query = torch.tensor([level in levels for level in pyramid.levels.tolist()])
    positions = (pyramid.cells + 0.5) * torch.tensor(
        [
            [full / size for full, size in zip(pyramid.level_shapes[0], shape, strict=True)]
            for shape in pyramid.level_shapes
        ],
        dtype=pyramid.values.dtype,
    )[pyramid.levels]
    counts = [int(is_query[pyramid.batch == image].sum()) for image in range(len(COUNTS))]
    offsets = torch.tensor([0, *[sum(counts[: i + 1]) for i in range(len(COUNTS))]])
    values = pyramid.values
    for layer in encoder.layers:
        attention: Any = layer.attention
        feed_forward: Any = layer.feed_forward
        new = feed_forward(
            attention(
                values[is_query],
                positions[is_query],
                offsets,
                FeaturePyramid(
                    values, pyramid.coordinates, pyramid.level_shapes, pyramid.batch_size
                ),
                query_level_indices=pyramid.coordinates[is_query, -1],
            )
        )
        values = values.clone()
        values[is_query] = new
    out: Tensor = encoder.norm(values)
    return out


@pytest.mark.parametrize("position_dim", [1, 2, 3])
def test_matches_its_layers_by_hand(position_dim: int) -> None:
    encoder = perturbed(make_encoder(3, position_dim))
    pyramid = make_pyramid(COUNTS, position_dim)
    out = encoder(pyramid)
    assert torch.equal(out.coordinates, pyramid.coordinates)
    assert (out.level_shapes, out.batch_size) == (pyramid.level_shapes, len(COUNTS))
    assert_close(out.values, by_hand(encoder, pyramid), 1e-12)


@pytest.mark.parametrize("levels", [[0], [1], (1, 0)])
def test_points_of_some_levels_are_queries(levels: list[int]) -> None:
    plain = perturbed(make_encoder(3))
    pyramid = make_pyramid(COUNTS)
    for checkpoint in (False, True):
        encoder = Encoder(
            list(plain.layers),  # type: ignore[arg-type]
            EMBED,
            query_levels=levels,
            checkpoint=checkpoint,
        ).double()
        encoder.norm = plain.norm
        expected, out = by_hand(plain, pyramid, tuple(levels)), encoder(pyramid).values
        assert_close(out, expected, 1e-12)
        weights = torch.randn_like(out)
        wanted, found = (
            torch.autograd.grad((x * weights).sum(), list(plain.parameters()))
            for x in (expected, out)
        )
        for actual, grad in zip(found, wanted, strict=True):
            assert_close(actual, grad, 1e-12 * max(1.0, float(grad.abs().max())))
        order = torch.randperm(len(pyramid))
        mixed = FeaturePyramid(
            pyramid.values[order], pyramid.coordinates[order], pyramid.level_shapes, len(COUNTS)
        )
        assert_close(encoder(mixed).values, expected[order], 1e-12)


def test_values_in_half_precision_under_autocast() -> None:
    """Autocast on CPUs refuses to promote float16."""
    encoder = Encoder([EncoderLayer(make_block(), FeedForward(EMBED))], EMBED, query_levels=[1])
    pyramid = make_pyramid(COUNTS, dtype=torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(pyramid).values.float()
    expected = encoder(pyramid.with_values(pyramid.values.float())).values
    assert_close(out, expected, 0.1)
    assert "query_levels=[1]" in repr(encoder)


@pytest.mark.parametrize("counts", [(), (0,), (1, 0, 1)])
def test_no_point_is_a_query(counts: tuple[int, ...]) -> None:
    encoder = Encoder([EncoderLayer(make_block(), FeedForward(EMBED))], EMBED, query_levels=[1])
    pyramid = make_pyramid(counts)  # a single point of an image is on the level 0
    out = encoder.double()(pyramid)
    assert torch.equal(out.values, encoder.norm(pyramid.values))


def test_one_plan_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return plan_neighborhoods(*arguments, **options)

    monkeypatch.setattr("vicinal.nn.block.plan_neighborhoods", spy)
    for checkpoint in (False, True):
        calls.clear()
        encoder = perturbed(make_encoder(4, checkpoint=checkpoint))
        encoder(make_pyramid(COUNTS)).values.sum().backward()
        assert len(calls) == 1


def test_checkpointing_gives_the_same_bits_and_stores_less() -> None:
    plain = perturbed(make_encoder(3, dropout=0.2))
    again = make_encoder(3, checkpoint=True, dropout=0.2).double()
    again.load_state_dict(plain.state_dict())
    pyramid = make_pyramid((60, 40))
    outs, stored, input_grads = [], [], []
    for encoder in (plain, again):
        values = pyramid.values.clone().requires_grad_()
        saved = SavedBytes()
        torch.manual_seed(2)
        with saved.counted():
            out = encoder(pyramid.with_values(values)).values
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        outs.append(out)
        stored.append(saved.nbytes)
        assert values.grad is not None
        input_grads.append(values.grad)
    assert torch.equal(*outs)
    assert torch.equal(*input_grads)
    others = gradients(again)
    for name, grad in gradients(plain).items():
        other = others[name]
        assert grad is not None, name
        assert other is not None, name
        assert torch.equal(grad, other), name
    assert stored[1] < stored[0] / 4


class MeanOfImage(nn.Module):
    """Another module with the signature of the attentions: adds the mean of the image."""

    def make_plan(
        self, positions: Tensor, offsets: Tensor, pyramid: FeaturePyramid, levels: Tensor
    ) -> list[slice]:
        return spans(offsets)

    def forward(
        self,
        query: Tensor,
        query_spatial_positions: Tensor,
        query_batch_offsets: Tensor,
        stacked_feature_maps: FeaturePyramid,
        level_spatial_shapes: Any = None,
        background_embedding: Tensor | None = None,
        query_level_indices: Tensor | None = None,
        query_mask: Tensor | None = None,
        *,
        plan: list[slice] | None = None,
    ) -> Tensor:
        assert plan is not None
        means = [stacked_feature_maps.values[rows].mean(0).expand_as(query[rows]) for rows in plan]
        return query + torch.cat(means)


def test_accepts_any_attention_with_the_same_signature() -> None:
    layers = [EncoderLayer(MeanOfImage(), nn.Identity()) for _ in range(2)]
    encoder = Encoder(layers, EMBED).double()
    pyramid = make_pyramid((5, 3))
    values = pyramid.values
    for _ in range(2):
        means = torch.cat((values[:5].mean(0).expand(5, -1), values[5:].mean(0).expand(3, -1)))
        values = values + means
    assert_close(encoder(pyramid).values, encoder.norm(values), 1e-12)


class AddsInput(EncoderLayer):
    """A layer that also adds the values that the encoder got. All points are queries of it."""

    def forward(  # type: ignore[override]
        self,
        values: Tensor,
        pyramid: FeaturePyramid,
        positions: Tensor,
        offsets: Tensor,
        plan: Any = None,
    ) -> Tensor:
        return super().forward(values, pyramid, positions, offsets, plan) + pyramid.values


def test_layers_that_use_the_values_of_the_pyramid_get_their_gradients() -> None:
    encoder = Encoder([AddsInput(MeanOfImage(), nn.Identity()) for _ in range(2)], EMBED)
    encoder.norm = nn.LayerNorm(EMBED, elementwise_affine=False)
    pyramid = make_pyramid((1,))  # whose mean is its point, so that the layers double it
    values = pyramid.values.requires_grad_()
    expected = nn.functional.layer_norm(7 * values, (EMBED,))
    out = encoder(pyramid).values
    assert_close(out, expected, 1e-12)
    weights = torch.randn_like(out)
    grad, wanted = (torch.autograd.grad(x, values, weights)[0] for x in (out, expected))
    assert_close(grad, wanted, 1e-12)


def test_a_layer_without_a_plan_makes_its_own() -> None:
    pyramid = make_pyramid(COUNTS)
    layer = EncoderLayer(make_block(), FeedForward(EMBED)).double()
    where = pyramid.positions(torch.float64), pyramid.batch_offsets()
    plan = layer.attention.make_plan(*where, pyramid)  # type: ignore[operator]
    values = torch.randn_like(pyramid.values)
    expected = layer(values, pyramid.with_values(values), *where, plan)
    assert torch.equal(layer(values, pyramid, *where), expected)


@pytest.mark.parametrize("counts", [(), (0,), (0, 0, 0), (0, 1)])
def test_few_or_no_points(counts: tuple[int, ...]) -> None:
    encoder = perturbed(make_encoder(2))
    out = encoder(make_pyramid(counts))
    assert out.values.shape == (sum(counts), EMBED)
    assert out.batch_size == len(counts)
    out.values.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_images_are_independent() -> None:
    encoder = perturbed(make_encoder(2))
    pyramid = make_pyramid((12, 9))
    out = encoder(pyramid).values
    for bad in (torch.nan, 1e3):
        spoilt = pyramid.values.clone()
        spoilt[3] = bad
        assert torch.equal(encoder(pyramid.with_values(spoilt)).values[12:], out[12:])


def test_invalid_arguments_are_refused_by_name() -> None:
    with refused("layers"):
        Encoder([], EMBED)
    encoder = make_encoder().double()
    with refused("pyramid"):
        encoder(torch.zeros(3, EMBED))  # type: ignore[arg-type]
    with refused("pyramid.values"):
        encoder(make_pyramid((5,), embed_dim=EMBED + 2))
    layers = list(encoder.layers)
    for levels in ([], [0, -1], [0.5], 1):
        with refused("query_levels"):
            Encoder(layers, EMBED, query_levels=levels)  # type: ignore[arg-type]
    with refused("pyramid", "levels=[12x10, 6x5]"):
        Encoder(layers, EMBED, query_levels=[2]).double()(make_pyramid((5, 3)))  # type: ignore[arg-type]
    pyramid = make_pyramid((5,))
    wrong = ([0.5, 1], [[0], [1]], [0, 5], [-1, 2], [3, 3])
    for rows in (*map(torch.tensor, wrong), [0, 1]):
        with refused("rows"):
            layers[0](
                pyramid.values, pyramid, pyramid.positions(), pyramid.batch_offsets(), None, rows
            )


def test_points_of_another_width_than_the_queries_are_refused() -> None:
    layers = [
        EncoderLayer(make_block(point_dim=point_dim), FeedForward(EMBED))
        for point_dim in (EMBED, EMBED + 2)
    ]
    encoder = Encoder(layers, EMBED).double()
    for embed_dim in (EMBED, EMBED + 2):
        pyramid = make_pyramid((5,), embed_dim=embed_dim)
        with refused("point_dim"):
            encoder(pyramid)
        with refused("point_dim"):
            layers[1](pyramid.values, pyramid, pyramid.positions(), pyramid.batch_offsets())


@pytest.mark.parametrize("kind", ["shuffled", "reversed"])
def test_points_come_in_any_order_of_images(kind: str) -> None:
    encoder, pyramid = perturbed(make_encoder()), make_pyramid(COUNTS)
    n = len(pyramid)
    order = torch.randperm(n) if kind == "shuffled" else torch.arange(n).flip(0)
    mixed = FeaturePyramid(
        pyramid.values[order], pyramid.coordinates[order], pyramid.level_shapes, len(COUNTS)
    )
    encoded = encoder(mixed)
    assert torch.equal(encoded.coordinates, mixed.coordinates)
    assert_close(encoded.values, encoder(pyramid).values[order], 1e-12)


def test_layers_of_other_windows_are_refused() -> None:
    other = SparseNeighborhoodAttentionBlock(EMBED, 2, 2, (3, 3))
    layers = [
        EncoderLayer(attention, FeedForward(EMBED))
        for attention in (make_block(), copy.copy(other))
    ]
    with refused("plan"):
        Encoder(layers, EMBED).double()(make_pyramid((5,)))


def test_unsorted_points_keep_the_rows_of_raw_points() -> None:
    points = torch.tensor([[0, 1, 2], [1, 0, 3], [0, 3, 3], [1, 2, 2]])
    pyramid = FeaturePyramid.from_points(
        points, torch.randn(4, EMBED), (4, 4), 2, strides=(1, 2), keep_point_rows=True
    )
    assert pyramid.point_rows is not None
    order = torch.arange(len(pyramid)).flip(0)
    shuffled = dataclasses.replace(
        pyramid,
        values=pyramid.values[order],
        coordinates=pyramid.coordinates[order],
        point_rows=len(order) - 1 - pyramid.point_rows,
    )
    encoder = make_encoder().float()
    expected, actual = encoder(pyramid), encoder(shuffled)
    assert_close(actual.values_of_points(0), expected.values_of_points(0), 1e-6)
