"""Small pyramids, queries, objects and detectors for the tests of `vicinal.detr`."""

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
from vicinal.detr import (
    Decoder,
    DecoderLayer,
    Denoiser,
    Detector,
    Encoder,
    EncoderLayer,
    FeedForward,
    ObjectQueries,
    QuerySelection,
    QuerySelfAttention,
    Targets,
)

EMBED, HEADS, CLASSES = 8, 2, 3
WINDOWS = (3, 5)
Shapes = tuple[tuple[int, ...], ...]
SHAPES: dict[int, Shapes] = {
    1: ((48,), (24,)),
    2: ((12, 10), (6, 5)),
    3: ((6, 5, 4), (3, 3, 2)),
}


def offsets_from_ids(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)])


def spans(offsets: Tensor) -> list[slice]:
    """The rows of every image."""
    return [slice(i, j) for i, j in itertools.pairwise(offsets.tolist())]


def make_pyramid(
    counts: Sequence[int],
    position_dim: int = 2,
    *,
    embed_dim: int = EMBED,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> FeaturePyramid:
    """``counts`` points per image, in cells of their own, of two levels in turns."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES[position_dim]
    cells = [
        torch.cartesian_prod(*map(torch.arange, shape)).view(-1, position_dim) for shape in shapes
    ]
    rows = [torch.empty(0, position_dim + 2, dtype=torch.int64)]
    for image, count in enumerate(counts):
        for level, n in enumerate((count - count // 2, count // 2)):
            free = torch.randperm(len(cells[level]), generator=generator)[:n]
            ends = torch.full((n, 1), image), torch.full((n, 1), level)
            rows.append(torch.cat((ends[0], cells[level][free], ends[1]), 1))
    coordinates = torch.cat(rows)
    values = torch.randn(len(coordinates), embed_dim, generator=generator, dtype=torch.float64)
    return FeaturePyramid(values.to(dtype), coordinates, shapes, len(counts))


def make_queries(
    counts: Sequence[int],
    position_dim: int = 2,
    *,
    embed_dim: int = EMBED,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> ObjectQueries:
    """``counts`` queries per image, anywhere on the map; embeddings and boxes require gradients."""
    generator = torch.Generator().manual_seed(seed)
    n, full = sum(counts), torch.tensor(SHAPES[position_dim][0], dtype=torch.float64)
    center = torch.rand(n, position_dim, generator=generator, dtype=torch.float64) * full
    size = 1 + 3 * torch.rand(n, position_dim, generator=generator, dtype=torch.float64)
    embeddings = torch.randn(n, embed_dim, generator=generator, dtype=torch.float64)
    return ObjectQueries(
        embeddings.to(dtype).requires_grad_(),
        torch.cat((center, size), 1).to(dtype).requires_grad_(),
        torch.randint(2, (n,), generator=generator),
        offsets_from_ids(counts),
    )


def make_targets(
    counts: Sequence[int],
    position_dim: int = 2,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Targets:
    """``counts`` objects per image, some beyond the edge of the map by half."""
    generator = torch.Generator().manual_seed(seed)
    n, full = sum(counts), torch.tensor(SHAPES[position_dim][0], dtype=torch.float64)
    center = torch.rand(n, position_dim, generator=generator, dtype=torch.float64) * full
    center[::4] = full
    size = 2 + 3 * torch.rand(n, position_dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return Targets(torch.cat((center, size), 1).to(dtype), labels, offsets_from_ids(counts))


def make_block(position_dim: int = 2, embed_dim: int = EMBED, **options: Any) -> Any:
    return SparseNeighborhoodAttentionBlock(
        embed_dim, HEADS, len(WINDOWS), WINDOWS, position_dim, **options
    )


def make_encoder(
    n_layers: int = 2, position_dim: int = 2, *, checkpoint: bool = False, dropout: float = 0.0
) -> Encoder:
    layers = [
        EncoderLayer(
            make_block(position_dim, dropout=dropout), FeedForward(EMBED, 2 * EMBED, dropout)
        )
        for _ in range(n_layers)
    ]
    return Encoder(layers, EMBED, checkpoint=checkpoint)


def make_decoder(
    n_layers: int = 2, position_dim: int = 2, *, checkpoint: bool = False, dropout: float = 0.0
) -> Decoder:
    layers = [
        DecoderLayer(
            QuerySelfAttention(EMBED, HEADS, position_dim, dropout),
            make_block(position_dim, dropout=dropout),
            FeedForward(EMBED, 2 * EMBED, dropout),
        )
        for _ in range(n_layers)
    ]
    return Decoder(layers, EMBED, CLASSES, position_dim, checkpoint=checkpoint)


def make_detector(
    position_dim: int = 2,
    *,
    n_queries: int = 5,
    levels: Sequence[int] | None = None,
    checkpoint: bool = False,
    denoiser: Denoiser | None = None,
) -> Detector:
    return Detector(
        make_encoder(2, position_dim, checkpoint=checkpoint),
        QuerySelection(EMBED, CLASSES, n_queries, levels, position_dim),
        make_decoder(2, position_dim, checkpoint=checkpoint),
        denoiser,
    )


def stir(module: nn.Module, share: float = 0.3) -> None:
    """Moves all parameters, so that what starts as nothing or as the identity is neither."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=share)


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


class SavedBytes:
    """Counts the bytes that the forward pass stores for the backward pass."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._storages: dict[int, Tensor] = {}

    @contextmanager
    def counted(self) -> Iterator[None]:
        def pack(x: Tensor) -> Tensor:
            place = x.untyped_storage().data_ptr()
            if place not in self._storages:
                self._storages[place] = x  # kept, so that nothing else gets its place
                self.nbytes += x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            yield


def refused(argument: str) -> Any:
    """Expects a ValueError that names ``argument``, what was expected and what came."""
    return pytest.raises(ValueError, match=rf"^{re.escape(argument)}: expected .*, got ")
