"""Denoising queries: noisy copies of the objects that the decoder learns to restore.

Li et al., "DN-DETR: Accelerate DETR Training by Introducing Query DeNoising", 2022.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._utils.checks import (
    as_integer,
    check_cells,
    check_counts,
    check_dropout,
    check_rate,
    check_type,
    refuse,
)
from .._utils.modules import Module
from .._utils.ragged import batch_ids, rank_in_image
from .._utils.random import uniform_from_hash
from ..pyramid import FeaturePyramid
from ..windows import level_scales
from .structures import (
    Matches,
    ObjectQueries,
    Predictions,
    Targets,
    check_boxes_on_map,
    check_object_queries,
    check_targets,
    pad_offsets,
)


class DenoisingQueries(NamedTuple):
    """Noisy copies of all objects, ordered by image, then by group.

    Attributes:
        boxes: floating ``[D, 2P]``, the objects' boxes with noise.
        labels: int64 ``[D]``, the objects' classes, some of them changed.
        target: int64 ``[D]``, the row of the targets that each query is a copy of.
        group: int64 ``[D]``, from 0: self-attention must not mix queries of different groups.
        offsets: int64 ``[B + 1]``: image ``b`` owns the rows ``offsets[b]:offsets[b + 1]``.

    Example:
        ```python
        import torch
        from vicinal.detr import Targets, make_denoising_queries

        targets = Targets(
            torch.tensor([[5.0, 5.0, 4.0, 4.0]]), torch.tensor([1]), torch.tensor([0, 1])
        )
        queries = make_denoising_queries(targets, n_groups=2, n_classes=3)
        assert queries.group.tolist() == [0, 1]
        assert queries.matches().target.tolist() == [0, 0]
        ```
    """

    boxes: Tensor
    labels: Tensor
    target: Tensor
    group: Tensor
    offsets: Tensor

    def matches(self) -> Matches:
        """Every query with its target, as `DetectionLoss` takes them."""
        return Matches(torch.arange(len(self.target), device=self.target.device), self.target)


class QueriesWithDenoising(NamedTuple):
    """Object queries of a detector together with denoising queries.

    Attributes:
        queries: all queries, ordered by image; those of the detector keep their groups, or are in
            group 0, and denoising queries have groups after these.
        detection_rows: int64 ``[N]``, the rows of the detector's queries, in their order.
        detection_offsets: int64 ``[B + 1]``, the offsets of the detector's queries.
        denoising_rows: int64 ``[D]``, the rows of the denoising queries, in their order.
        denoising_offsets: int64 ``[B + 1]``, the offsets of the denoising queries.
        matches: the object of each denoising query.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.detr import DenoisingQueryGenerator, ObjectQueries, Targets

        pyramid = FeaturePyramid(torch.randn(1, 8), torch.tensor([[0, 1, 1, 0]]), ((4, 4),), 1)
        box, one = torch.tensor([[1.5, 1.5, 2.0, 2.0]]), torch.tensor([0, 1])
        queries = ObjectQueries(torch.randn(1, 8), box, torch.tensor([0]), one)
        targets = Targets(box, torch.tensor([2]), one)
        joined = DenoisingQueryGenerator(8, n_classes=3, n_groups=2)(queries, targets, pyramid)
        assert len(joined.queries.embeddings) == 3
        assert joined.detection_rows.tolist() == [0]
        assert joined.denoising_rows.tolist() == [1, 2]
        ```
    """

    queries: ObjectQueries
    detection_rows: Tensor
    detection_offsets: Tensor
    denoising_rows: Tensor
    denoising_offsets: Tensor
    matches: Matches

    def split(self, predictions: Predictions) -> tuple[Predictions, Predictions]:
        """Splits predictions of all queries.

        Args:
            predictions: of ``queries``, ``N + D`` rows.

        Returns:
            the predictions of the detector's queries, and those of the denoising queries.
        """
        logits, boxes, _ = predictions
        detection, denoising = self.detection_rows, self.denoising_rows
        return (
            Predictions(logits[detection], boxes[detection], self.detection_offsets),
            Predictions(logits[denoising], boxes[denoising], self.denoising_offsets),
        )


class DenoisingQueryGenerator(Module):
    """Adds noisy copies of the objects to the queries of a detector, in training.

    The decoder learns to restore the objects from them, without any matching (Li et al., "DN-DETR",
    2022).

    Args:
        embed_dim: width of the embeddings, E.
        n_classes: number of classes, C.
        n_groups: noisy copies of every object; the copies of a group attend to each other, and to
            no other queries. Default 3.
        label_noise: probability of changing a label; default 0.2.
        box_noise: magnitude of the noise of boxes, see `make_denoising_queries`; default 0.4.
        box_size: the level of a query is the one where its box is closest to ``box_size`` cells
            wide; default 4.

    Raises:
        ValueError: a count is below 1, ``box_size`` is not positive, ``label_noise`` is outside
            [0, 1], or ``box_noise`` is outside [0, 1).

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.detr import DenoisingQueryGenerator, ObjectQueries, Targets

        pyramid = FeaturePyramid(torch.randn(1, 8), torch.tensor([[0, 1, 1, 0]]), ((4, 4),), 1)
        box, one = torch.tensor([[1.5, 1.5, 2.0, 2.0]]), torch.tensor([0, 1])
        queries = ObjectQueries(torch.randn(1, 8), box, torch.tensor([0]), one)
        targets = Targets(box, torch.tensor([2]), one)
        joined = DenoisingQueryGenerator(8, n_classes=3)(queries, targets, pyramid)
        assert joined.queries.groups.tolist() == [0, 1, 2, 3]
        ```
    """

    def __init__(
        self,
        embed_dim: int,
        n_classes: int,
        n_groups: int = 3,
        label_noise: float = 0.2,
        box_noise: float = 0.4,
        box_size: float = 4.0,
    ) -> None:
        super().__init__()
        check_counts(embed_dim=embed_dim, n_classes=n_classes, n_groups=n_groups)
        check_cells("box_size", box_size)
        check_rate("label_noise", label_noise)
        check_dropout("box_noise", box_noise)
        self.n_classes, self.n_groups = int(n_classes), int(n_groups)
        self.label_noise, self.box_noise, self.box_size = label_noise, box_noise, box_size
        self.labels = nn.Embedding(self.n_classes, int(embed_dim))

    def forward(
        self, queries: ObjectQueries, targets: Targets, pyramid: FeaturePyramid
    ) -> QueriesWithDenoising:
        """Adds denoising queries, drawn with PyTorch's global random number generator.

        Args:
            queries: the detector's own.
            targets: the objects of the same images.
            pyramid: the points that the queries attend to.

        Returns:
            the queries of both kinds, ordered by image.

        Raises:
            ValueError: queries or targets are not valid (`check_targets`), are on another device or
                not of the same images, or targets have a dtype that cannot hold the map's cells.
        """
        check_type("pyramid", pyramid, FeaturePyramid)
        queries = check_object_queries(queries, self.labels.embedding_dim, pyramid.position_dim)
        n_own, device = len(queries.embeddings), queries.embeddings.device
        n_images = max(pyramid.batch_size, len(queries.offsets) - 1)
        own_offsets = pad_offsets("queries.offsets", queries.offsets, n_images)
        targets = check_targets(
            targets, pyramid.position_dim, self.n_classes, n_images, device=device
        )
        check_boxes_on_map("targets.boxes", targets.boxes, pyramid)
        noisy = make_denoising_queries(
            targets,
            self.n_groups,
            label_noise=self.label_noise,
            box_noise=self.box_noise,
            n_classes=self.n_classes,
        )
        embeddings = self.labels(noisy.labels).to(queries.embeddings.dtype)
        image = torch.cat(
            (batch_ids(own_offsets, n_own), batch_ids(noisy.offsets, len(noisy.boxes)))
        )
        order = torch.argsort(image, stable=True)
        own_groups = noisy.group.new_zeros(n_own) if queries.groups is None else queries.groups
        # Their groups come after those of the detector's queries; without any, from 1 on.
        last = torch.cat((own_groups, own_groups.new_zeros(1))).max()
        groups = torch.cat((own_groups, noisy.group + last + 1))
        joined = ObjectQueries(
            torch.cat((queries.embeddings, embeddings))[order],
            torch.cat((queries.boxes, noisy.boxes.to(queries.boxes)))[order],
            torch.cat((queries.levels, self._levels(noisy.boxes, pyramid)))[order],
            own_offsets + noisy.offsets,
            groups[order],
        )
        row = torch.argsort(order)
        return QueriesWithDenoising(
            joined, row[:n_own], own_offsets, row[n_own:], noisy.offsets, noisy.matches()
        )

    def _levels(self, boxes: Tensor, pyramid: FeaturePyramid) -> Tensor:
        """int64 ``[D]``: the level where a box is nearest to ``box_size`` cells, on a log scale."""
        log_size = boxes[:, pyramid.position_dim :].log().mean(1)
        log_cell = -level_scales(pyramid.level_shapes, boxes).log().mean(1)
        return (log_size[:, None] - log_cell - math.log(self.box_size)).abs().argmin(1)


def make_denoising_queries(
    targets: Targets,
    n_groups: int,
    *,
    label_noise: float = 0.2,
    box_noise: float = 0.4,
    n_classes: int,
    generator: torch.Generator | None = None,
) -> DenoisingQueries:
    """Makes ``n_groups`` noisy copies of every object (Li et al., "DN-DETR", 2022).

    A center moves by up to ``box_noise / 2`` of the object's size, so it stays inside the box; a
    size is multiplied by a factor in ``1 ± box_noise``. Noise is uniform and independent per axis.
    It depends on the seed, the object and the group only, not on the rest of the batch.

    Args:
        targets: the objects.
        n_groups: number of copies, at least 0.
        label_noise: probability of replacing a label by another class, in [0, 1]; default 0.2.
        box_noise: magnitude of the noise of boxes, in [0, 1); default 0.4.
        n_classes: number of classes, C.
        generator: draws the seed of the noise; None (default): PyTorch's global generator.

    Returns:
        ``D = n_groups * M`` queries.

    Raises:
        ValueError: targets are not valid (`check_targets`), or a number is out of range.

    Example:
        ```python
        import torch
        from vicinal.detr import Targets, make_denoising_queries

        targets = Targets(
            torch.tensor([[5.0, 5.0, 4.0, 4.0]]), torch.tensor([1]), torch.tensor([0, 1])
        )
        queries = make_denoising_queries(targets, n_groups=2, box_noise=0.5, n_classes=3)
        assert (queries.boxes[:, :2] - 5).abs().max() <= 1
        ```
    """
    _check_noise(n_groups, label_noise, box_noise, n_classes)
    boxes, labels, offsets = check_targets(targets, None, n_classes, None)
    if generator is not None:
        check_type("generator", generator, torch.Generator)
    n_groups, n_classes = int(n_groups), int(n_classes)
    device, n_rows = boxes.device, n_groups * len(labels)
    seed_device = device if generator is None else generator.device

    counts = offsets.diff()
    image = torch.repeat_interleave(counts * n_groups, output_size=n_rows)
    row_in_image = rank_in_image(image, n_groups * offsets)
    group = row_in_image // counts[image]
    target = offsets[image] + row_in_image % counts[image]

    seed = torch.randint(2**62, (), generator=generator, device=seed_device).to(device)
    noise = _uniform_noise(seed, boxes[target], labels[target], group)
    # Noise is relative to the size; of the center, to half of it.
    shift, growth = (box_noise * (2 * noise[:, :-2] - 1)).to(boxes).chunk(2, 1)
    center, size = boxes[target].chunk(2, 1)
    noisy = torch.cat((center + shift * size / 2, size * (1 + growth)), 1)

    step = (noise[:, -1] * max(n_classes - 1, 1)).long() + 1
    step = torch.where(noise[:, -2] < label_noise, step, 0)
    return DenoisingQueries(
        noisy, (labels[target] + step) % n_classes, target, group, offsets * n_groups
    )


def _uniform_noise(seed: Tensor, boxes: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """``[D, 2P + 2]``, uniform in [0, 1), of objects ``[D]`` in groups ``[D]``.

    Noise is a hash of the seed, the object and its group. So processes that share a batch and draw
    the same seed generate the same noise as a single process.
    """
    columns = torch.arange(boxes.shape[1] + 2, device=boxes.device)
    key = (*_box_bits(boxes), labels, group)
    return uniform_from_hash(seed, [*(number[:, None] for number in key), columns])


def _box_bits(boxes: Tensor) -> tuple[Tensor, ...]:
    """All bits of the numbers of every box, 32 each in tensors ``[D]``."""
    if boxes.dtype != torch.float64:
        return boxes.float().view(torch.int32).long().unbind(1)
    bits = boxes.contiguous().view(torch.int64)
    return (*bits.unbind(1), *(bits >> 32).unbind(1))


def _check_noise(n_groups: int, label_noise: float, box_noise: float, n_classes: int) -> None:
    for name, number, least in (("n_groups", n_groups, 0), ("n_classes", n_classes, 1)):
        count = as_integer(number)
        if count is None or count < least:
            refuse(name, f"an integer of at least {least}", number)
    check_rate("label_noise", label_noise)
    check_dropout("box_noise", box_noise)
