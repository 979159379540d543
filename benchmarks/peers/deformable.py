"""Multi-scale deformable attention at as many keys per query, on dense maps.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection" (2021), in
the plain PyTorch of `transformers`. It samples places that the network predicts, whatever they
hold, so it computes something else: there is nothing to agree on, and the places are random here.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from benchmarks.layer import Layer
from benchmarks.peers.contest import Contest
from benchmarks.peers.densify import densified
from benchmarks.work import Work


def problem(layer: Layer) -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if layer.pyramid.position_dim != 2:
        return "it samples images, of two dimensions"
    return None


def prepare(layer: Layer) -> Contest:
    """The sampling alone: values, places and weights given."""
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        MultiScaleDeformableAttention,
    )

    sample = MultiScaleDeformableAttention()
    shapes = list(layer.pyramid.level_shapes)
    starts = torch.tensor([0, *(h * w for h, w in shapes)]).cumsum(0)[:-1]
    places, weights = _places_and_weights(layer)

    def attend(value: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = sample(value, torch.tensor(shapes), shapes, starts, places, weights, 64)
        return out

    ours = layer.attention()
    value = densified(layer, ours.inputs[2])[None]
    keys = weights.shape[-1] * len(shapes)
    return Contest(
        Work(attend, (value, places, weights)),
        ours,
        same=False,
        apart={"keys_per_query": keys, "map_mib": value.nbytes / 2**20},
    )


def _places_and_weights(layer: Layer) -> tuple[Tensor, Tensor]:
    """Places [1, N, H, L, K, 2] within each level's window, in [0, 1] as (x, y), and weights.

    K is such that a query samples as many keys as it has neighbors on average.
    """
    n, heads, n_levels = len(layer), layer.block.n_heads, layer.pyramid.n_levels
    per_level = max(1, round(layer.n_pairs / n / n_levels))
    shapes = torch.tensor(layer.pyramid.level_shapes)
    windows = torch.tensor(layer.scene.windows)[:, None] / shapes  # [L, 2], as parts of the map
    offsets = torch.rand(1, n, heads, n_levels, per_level, 2) - 0.5
    centers = (layer.positions / shapes.amax(0))[:, None, None, None]
    places = (centers + offsets * windows[:, None]).flip(-1)
    weights = torch.randn(places.shape[:-1]).flatten(-2).softmax(-1)
    return places, weights.view(places.shape[:-1])
