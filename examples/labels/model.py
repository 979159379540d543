"""Networks that label points: a U-Net with an attention, or for comparison none at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.directions import ring
from examples.formats.raw import IGNORED
from examples.labels.scenes import LabeledPoints
from examples.labels.tasks import Task
from vicinal import SparseDeformableAttention, SparseNeighborhoodAttentionBlock
from vicinal.detr import FeedForward, PointStem, mean_object_count
from vicinal.nets import PointUNet

ATTENTIONS = ("neighborhood", "deformable", "pooling", "stem")
SAMPLES = 16  # of deformable attention, per head


class PointLabeler(nn.Module):
    """Maps batches of labeled points to a loss or to predicted labels.

    Args:
        task: what is learned.
        attention: ``"neighborhood"`` or ``"deformable"``; ``"pooling"`` for a U-Net of feed-forward
            layers, twice as many, so that levels alone connect points; ``"stem"`` for the stem
            alone. All have about as many parameters.
    """

    def __init__(self, task: Task, attention: str = "neighborhood") -> None:
        super().__init__()
        self.task = task
        self.net: nn.Module = _make_net(task, attention)

    def forward(self, batch: LabeledPoints) -> dict[str, Tensor]:
        """Computes the training loss: the mean cross entropy of the points whose label is known."""
        logits, labels = self.logits(batch).float(), batch.labels
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        n_points = mean_object_count((labels != IGNORED).sum(), labels.device)
        return {"labels": total / n_points}

    @torch.no_grad()
    def predict(self, batch: LabeledPoints) -> Tensor:
        """Predicts the labels, int64 ``[n]``."""
        return self.eval().logits(batch).argmax(1)

    def logits(self, batch: LabeledPoints) -> Tensor:
        """``[n, classes]``."""
        logits: Tensor = self.net(
            batch.coordinates,
            batch.values,
            batch.spatial_shape or self.task.spatial_shape,
            batch.batch_size,
            periodic_axes=self.task.periodic_axes,
        )
        return logits


def _make_net(task: Task, attention: str) -> nn.Module:
    sizes, net = (task.channels, len(task.classes)), task.net
    if attention == "stem":
        return _widest_stem(task)
    if attention == "pooling":
        doubled = net | {"depths": tuple(2 * depth for depth in net["depths"])}
        return PointUNet(*sizes, **doubled, make_attention=lambda _: NoAttention())
    if attention == "deformable":
        position_dim = net.get("position_dim", 2)

        def make_attention(level: int) -> nn.Module:
            width, heads = net["embed_dims"][level], net["n_heads"][level]
            return SparseDeformableAttention(width, heads, 1, SAMPLES, position_dim)

        return PointUNet(*sizes, **net, make_attention=make_attention)
    unet = PointUNet(*sizes, **net)
    if task.directions:
        for module in unet.modules():
            if isinstance(module, SparseNeighborhoodAttentionBlock):
                module.pos_encoding.set_directions(ring(module.n_heads))
    return unet


class NoAttention(nn.Module):
    """In the place of an attention module: returns its queries."""

    def make_plan(self, *arguments: Any) -> None:
        """Returns None, since nothing is attended to."""

    def forward(self, query: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Returns ``query``."""
        return query


class StemLabeler(nn.Module):
    """The stem, the features of a point's cells on all levels, and feed-forward layers."""

    def __init__(self, task: Task, embed_dim: int) -> None:
        super().__init__()
        net = task.net
        windows = {
            name.removeprefix("stem_"): net[name] for name in net if name.startswith("stem_")
        }
        position_dim = net.get("position_dim", 2)
        self.stem = PointStem(
            task.channels, embed_dim, net["strides"], **windows, position_dim=position_dim
        )
        self.head = nn.Sequential(
            nn.Linear(len(net["strides"]) * embed_dim, embed_dim),
            FeedForward(embed_dim),
            FeedForward(embed_dim),
            nn.LayerNorm(embed_dim),
            nn.Linear(embed_dim, len(task.classes)),
        )

    def forward(
        self,
        coordinates: Tensor,
        values: Tensor,
        spatial_shape: tuple[int, ...],
        batch_size: int,
        periodic_axes: tuple[int, ...],
    ) -> Tensor:
        """As `PointUNet`."""
        pyramid = self.stem(
            coordinates,
            values,
            spatial_shape,
            batch_size,
            periodic_axes=periodic_axes,
            keep_point_rows=True,
        )
        logits: Tensor = self.head(pyramid.values_of_points().flatten(1))
        return logits


def _widest_stem(task: Task) -> StemLabeler:
    """The widest of no more parameters than the U-Net has."""
    most = count_parameters(PointUNet(task.channels, len(task.classes), **task.net))
    width = 8
    with torch.device("meta"):
        while count_parameters(StemLabeler(task, width + 8)) <= most:
            width += 8
    return StemLabeler(task, width)


def count_parameters(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
