"""Small pyramids, queries, objects and detectors for the tests of `vicinal.detr`."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
from vicinal.detr import (
    Decoder,
    DecoderLayer,
    DenoisingQueryGenerator,
    Detector,
    Encoder,
    EncoderLayer,
    FeedForward,
    ObjectQueries,
    Predictions,
    QuerySelection,
    QuerySelfAttention,
    Targets,
)

Module = TypeVar("Module", bound=nn.Module)
EMBED, HEADS, CLASSES = 8, 2, 3
POINTS, OBJECTS = (30, 0, 12, 25), (3, 1, 0, 4)  # of the images of a batch
WINDOWS = (3, 5)
Shapes = tuple[tuple[int, ...], ...]
SHAPES: dict[int, Shapes] = {
    1: ((48,), (24,)),
    2: ((12, 10), (6, 5)),
    3: ((6, 5, 4), (3, 3, 2)),
}


def offsets_from_counts(counts: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)])


# The library takes what NumPy has, though its annotations name tensors and ints.
as_array: Callable[..., Any] = np.array
integer: Callable[..., Any] = np.int64


def array(x: Tensor) -> Any:
    return x.detach().numpy()


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
    """``counts`` points per image, in distinct cells, half of them on each of two levels."""
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


def _centers_and_sizes(
    n: int, position_dim: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """``[n, P]`` each: centers anywhere on the map, and sizes from 0 to 3 cells."""
    center = torch.rand(n, position_dim, generator=generator, dtype=torch.float64)
    size = 3 * torch.rand(n, position_dim, generator=generator, dtype=torch.float64)
    return center * torch.tensor(SHAPES[position_dim][0], dtype=torch.float64), size


def make_queries(
    counts: Sequence[int],
    position_dim: int = 2,
    *,
    embed_dim: int = EMBED,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> ObjectQueries:
    """``counts`` queries per image, anywhere on the map; embeddings and boxes require gradients."""
    generator, n = torch.Generator().manual_seed(seed), sum(counts)
    center, size = _centers_and_sizes(n, position_dim, generator)
    embeddings = torch.randn(n, embed_dim, generator=generator, dtype=torch.float64)
    return ObjectQueries(
        embeddings.to(dtype).requires_grad_(),
        torch.cat((center, 1 + size), 1).to(dtype).requires_grad_(),
        torch.randint(2, (n,), generator=generator),
        offsets_from_counts(counts),
    )


def make_targets(
    counts: Sequence[int],
    position_dim: int = 2,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Targets:
    """``counts`` objects per image, some of them centered on the corner of the map."""
    generator, n = torch.Generator().manual_seed(seed), sum(counts)
    center, size = _centers_and_sizes(n, position_dim, generator)
    center[::4] = torch.tensor(SHAPES[position_dim][0], dtype=torch.float64)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return Targets(torch.cat((center, 2 + size), 1).to(dtype), labels, offsets_from_counts(counts))


def random_boxes(n: int, position_dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(2, n, position_dim, generator=generator, dtype=torch.float64)
    return torch.cat((6 * draws[0], 2 * draws[1] + 0.2), 1)


def random_images(
    sizes: list[tuple[int, int]], position_dim: int = 2, seed: int = 0
) -> tuple[Predictions, Targets]:
    """Images with the given numbers of predictions and objects."""
    queries, objects = [n for n, _ in sizes], [m for _, m in sizes]
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(sum(queries), CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (sum(objects),), generator=generator)
    return (
        Predictions(
            logits, random_boxes(sum(queries), position_dim, seed), offsets_from_counts(queries)
        ),
        Targets(
            random_boxes(sum(objects), position_dim, seed + 1), labels, offsets_from_counts(objects)
        ),
    )


def plain_giou(a: list[float], b: list[float]) -> float:
    dim = len(a) // 2
    shared = hull = a_volume = b_volume = 1.0
    for axis in range(dim):
        (a_low, a_high), (b_low, b_high) = (
            (box[axis] - box[dim + axis] / 2, box[axis] + box[dim + axis] / 2) for box in (a, b)
        )
        shared *= max(min(a_high, b_high) - max(a_low, b_low), 0)
        hull *= max(a_high, b_high) - min(a_low, b_low)
        a_volume, b_volume = a_volume * (a_high - a_low), b_volume * (b_high - b_low)
    union = a_volume + b_volume - shared
    return shared / union - (hull - union) / hull


def plain_focal(logit: float, present: bool, alpha: float, gamma: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    if present:
        return -alpha * math.pow(1 - p, gamma) * math.log(p)
    return -(1 - alpha) * math.pow(p, gamma) * math.log(1 - p)


def plain_varifocal(logit: float, quality: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -quality * (quality * math.log(p) + (1 - quality) * math.log(1 - p))


def make_block(position_dim: int = 2, embed_dim: int = EMBED, **options: Any) -> Any:
    return SparseNeighborhoodAttentionBlock(
        embed_dim, HEADS, len(WINDOWS), WINDOWS, position_dim, **options
    )


MakeAttention = Callable[[], nn.Module]


def make_encoder(
    n_layers: int = 2,
    position_dim: int = 2,
    *,
    checkpoint: bool = False,
    dropout: float = 0.0,
    attention: MakeAttention | None = None,
) -> Encoder:
    """``attention`` makes the attention of a layer; None: `make_block`."""
    attention = attention or (lambda: make_block(position_dim, dropout=dropout))
    layers = [
        EncoderLayer(attention(), FeedForward(EMBED, 2 * EMBED, dropout)) for _ in range(n_layers)
    ]
    return Encoder(layers, EMBED, checkpoint=checkpoint)


def make_decoder(
    n_layers: int = 2,
    position_dim: int = 2,
    *,
    checkpoint: bool = False,
    dropout: float = 0.0,
    attention: MakeAttention | None = None,
) -> Decoder:
    """``attention`` makes the cross-attention of a layer; None: `make_block`."""
    attention = attention or (lambda: make_block(position_dim, dropout=dropout))
    layers = [
        DecoderLayer(
            QuerySelfAttention(EMBED, HEADS, position_dim, dropout),
            attention(),
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
    denoiser: DenoisingQueryGenerator | None = None,
    attention: MakeAttention | None = None,
) -> Detector:
    """Two layers of each kind; ``attention`` as in `make_encoder` and `make_decoder`."""
    return Detector(
        make_encoder(2, position_dim, checkpoint=checkpoint, attention=attention),
        QuerySelection(EMBED, CLASSES, n_queries, levels, position_dim),
        make_decoder(2, position_dim, checkpoint=checkpoint, attention=attention),
        denoiser,
    )


def stir(module: nn.Module, share: float = 0.3) -> None:
    """Perturbs all parameters, so that none are zero or the identity."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=share)


def perturbed(module: Module, share: float = 0.1) -> Module:
    """``module`` in float64, perturbed."""
    stir(module, share)
    return module.double()


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
            address = x.untyped_storage().data_ptr()
            if address not in self._storages:
                self._storages[address] = x  # kept alive, so its address is not reused
                self.nbytes += x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            yield


def refused(argument: str, came: str = "") -> Any:
    """Expects a ValueError that names ``argument``, what was expected, and what came."""
    pattern = rf"^{re.escape(argument)}: expected .*, got .*{re.escape(came)}"
    return pytest.raises(ValueError, match=pattern)


PREDICTIONS, TARGETS = random_images([(4, 2), (3, 2)])


def changed(of: Predictions | Targets, part: str, row: int, value: Any) -> Any:
    """With one row of one part set to ``value``."""
    replaced = getattr(of, part).clone()
    replaced[row] = value
    return of._replace(**{part: replaced})


WRONG_PREDICTIONS: list[tuple[Any, str, str]] = [
    (None, "predictions", "NoneType"),
    (changed(PREDICTIONS, "logits", 5, torch.nan), "predictions.logits", "in row 5"),
    (changed(PREDICTIONS, "logits", 2, -torch.inf), "predictions.logits", "in row 2"),
    (changed(PREDICTIONS, "boxes", 6, torch.inf), "predictions.boxes", "in row 6"),
    (changed(PREDICTIONS, "boxes", 1, torch.tensor([1, 1, 0, 1.0])), "predictions.boxes", "row 1"),
    (PREDICTIONS._replace(boxes=torch.rand(6, 4)), "predictions.boxes", "[6, 4]"),
    (PREDICTIONS._replace(boxes=torch.rand(7, 3)), "predictions.boxes", "[7, 3]"),
    (PREDICTIONS._replace(logits=torch.rand(7)), "predictions.logits", "[7]"),
    (changed(PREDICTIONS, "offsets", 2, 6), "predictions.offsets", "to 6"),
    (changed(PREDICTIONS, "offsets", 1, 8), "predictions.offsets", "7 after 8"),
    (PREDICTIONS._replace(offsets=torch.tensor([0.0, 4, 7])), "predictions.offsets", "float32"),
    (PREDICTIONS._replace(offsets=torch.tensor([]).long()), "predictions.offsets", "[0]"),
]
WRONG_TARGETS: list[tuple[Any, str, str]] = [
    ((TARGETS.boxes, TARGETS.labels, TARGETS.offsets), "targets", "tuple"),
    (changed(TARGETS, "labels", 0, -1), "targets.labels", "from -1"),
    (changed(TARGETS, "boxes", 3, torch.nan), "targets.boxes", "in row 3"),
    (changed(TARGETS, "boxes", 2, torch.tensor([1, 1, 1, 0.0])), "targets.boxes", "0.0] in row 2"),
    (changed(TARGETS, "boxes", 1, torch.tensor([1, 1, -2, 1.0])), "targets.boxes", "-2.0, 1.0]"),
    (TARGETS._replace(labels=torch.zeros(4)), "targets.labels", "float32"),
    (TARGETS._replace(labels=torch.zeros(3).long()), "targets.labels", "[3]"),
    (TARGETS._replace(boxes=torch.rand(4, 5)), "targets.boxes", "[4, 5]"),
    (TARGETS._replace(offsets=torch.tensor([]).long()), "targets.offsets", "[0]"),
    (changed(TARGETS, "offsets", 0, 1), "targets.offsets", "from 1"),
]
# Valid by themselves, but not for these predictions.
TARGETS_OF_OTHERS: list[tuple[Any, str, str]] = [
    (TARGETS._replace(boxes=torch.rand(4, 6)), "targets.boxes", "[4, 6]"),
    (TARGETS._replace(offsets=torch.tensor([0, 2, 4, 4])), "targets.offsets", "3 images"),
]
