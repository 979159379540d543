"""What a CUDA graph of a decoder needs, without a GPU: fixed sizes, and no waiting for contents."""

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
from vicinal import plan as plan_module
from vicinal.detr import (
    Decoder,
    DecoderLayer,
    FeedForward,
    ObjectQueries,
    QuerySelfAttention,
    ReferencePoints,
)
from vicinal.detr import layers as detr_layers

EMBED, HEADS, SIZES = 8, 2, (3, 5)
SHAPES = ((12, 10), (6, 5))


def make_decoder(max_queries: int | None = None, at_sides: bool = False) -> Decoder:
    torch.manual_seed(0)
    layers = [
        DecoderLayer(
            QuerySelfAttention(EMBED, HEADS, max_queries=max_queries),
            SparseNeighborhoodAttentionBlock(EMBED, HEADS, 2, SIZES),
            FeedForward(EMBED),
            reference_points=ReferencePoints(EMBED) if at_sides else None,
        )
        for _ in range(2)
    ]
    return Decoder(layers, EMBED, n_classes=3).double()


def make_queries(*counts: int) -> ObjectQueries:
    n, generator = sum(counts), torch.Generator().manual_seed(1)
    real: Any = {"generator": generator, "dtype": torch.float64}
    boxes = torch.cat((10 * torch.rand(n, 2, **real), 1 + torch.rand(n, 2, **real)), 1)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    levels = torch.arange(n) % 2
    return ObjectQueries(torch.randn(n, EMBED, **real), boxes, levels, offsets)


def make_points(n: int, n_images: int) -> FeaturePyramid:
    generator = torch.Generator().manual_seed(2)
    level = torch.randint(0, 2, (n, 1), generator=generator)
    sizes = torch.tensor(SHAPES)[level[:, 0]]
    cells = (torch.rand(n, 2, generator=generator) * sizes).long()
    images = torch.randint(0, n_images, (n, 1), generator=generator)
    values = torch.randn(n, EMBED, generator=generator, dtype=torch.float64)
    return FeaturePyramid(values, torch.cat((images, cells, level), 1), SHAPES, n_images)


def results(decoder: Decoder, queries: ObjectQueries, points: FeaturePyramid) -> list[Tensor]:
    predictions, _ = decoder(queries, points)
    return [x for layer in predictions for x in (layer.logits, layer.boxes)]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_points_outside_the_map_fill_up_to_a_fixed_number() -> None:
    decoder, queries, points = make_decoder(), make_queries(7), make_points(60, 1)
    coordinates = torch.cat((points.coordinates, torch.full((40, 4), -1)))
    values = torch.cat((points.values, torch.full((40, EMBED), 1e6, dtype=torch.float64)))
    padded = FeaturePyramid(values, coordinates, SHAPES, 1, check_contents=False)
    assert_close(results(decoder, queries, padded), results(decoder, queries, points))


@pytest.mark.parametrize("counts", [(7,), (4, 0, 6), ()])
@pytest.mark.parametrize("grouped", [False, True])
def test_padding_to_a_given_number_of_queries_changes_nothing(
    counts: tuple[int, ...], grouped: bool
) -> None:
    queries, points = make_queries(*counts), make_points(60, max(len(counts), 1))
    if grouped:
        queries = queries._replace(groups=torch.arange(sum(counts)) % 2)
    expected = results(make_decoder(), queries, points)
    for max_queries in (7, 20):
        assert_close(results(make_decoder(max_queries), queries, points), expected)


def test_more_queries_than_given_are_refused() -> None:
    with pytest.raises(ValueError, match=r"queries.offsets: expected at most 5 .*, got .* 6"):
        make_decoder(5)(make_queries(4, 6), make_points(60, 2))
    with pytest.raises(ValueError, match="max_queries"):
        QuerySelfAttention(EMBED, HEADS, max_queries=0)


def test_without_checks_further_queries_attend_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where offsets are not read."""
    monkeypatch.setattr(detr_layers, "reads_contents", lambda *_: False)
    torch.manual_seed(0)
    attention = QuerySelfAttention(EMBED, HEADS, max_queries=4).double()
    torch.nn.init.zeros_(attention.out_proj.bias)
    queries = make_queries(4, 6)
    out = attention(queries)
    kept = [0, 1, 2, 3, 4, 5, 6, 7]  # the first four of each image
    fewer = ObjectQueries(
        queries.embeddings[kept], queries.boxes[kept], queries.levels[kept], torch.tensor([0, 4, 8])
    )
    assert_close([out[kept]], [attention(fewer)])
    assert torch.equal(out[8:], queries.embeddings[8:])
    (grad,) = torch.autograd.grad(attention(queries).square().sum(), [attention.in_proj.weight])
    assert grad.isfinite().all()
    embeddings = queries.embeddings.index_fill(0, torch.tensor([9]), math.nan)
    broken = attention(queries._replace(embeddings=embeddings))
    assert torch.equal(broken[kept], out[kept])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("counts", "max_queries", "at_sides"),
    [((300,), None, False), ((120, 180), 200, False), ((120, 180), 200, True)],
)
def test_a_capture_reads_no_contents(
    counts: tuple[int, ...],
    max_queries: int | None,
    at_sides: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors of torch's meta device have none; the host's code is that for a GPU."""
    from benchmarks.launches import count, meta_as_gpu

    with meta_as_gpu(), torch.device("meta"):
        decoder = make_decoder(max_queries, at_sides).float()
        n = sum(counts)
        queries = ObjectQueries(
            torch.zeros(n, EMBED), torch.zeros(n, 4), torch.zeros(n, dtype=torch.int64),
            torch.zeros(len(counts) + 1, dtype=torch.int64),
        )  # fmt: skip
        coordinates = torch.zeros(2000, 4, dtype=torch.int64)
        points = FeaturePyramid(torch.zeros(2000, EMBED), coordinates, SHAPES, len(counts))
        monkeypatch.setattr(plan_module, "execution_mode", lambda device: "graph")
        with torch.no_grad():
            found = count(lambda: decoder(queries, points))
    assert found.names["attend"] == 2
    assert found.names["find_slices"] >= 2
