"""What a rank has of a scene, and the training step of an encoder on it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from benchmarks.ranks.settings import RanksSettings
from benchmarks.scenes import STRIDES, Scene
from vicinal import FeaturePyramid, NeighborhoodPlan, QueryPlacement
from vicinal.detr import Encoder, EncoderLayer, FeedForward
from vicinal.distributed import partition_space, plan_sharded, shard_attention, sum_gradients
from vicinal.nn import SparseNeighborhoodAttentionBlock

# What a point costs besides its pairs, in pairs: most of a step is the dense maps of rows.
PAIRS_PER_ROW = 300


class Share:
    """The points of a rank and the encoder, of which every rank has the same copy.

    Without a group, the whole scene and an encoder as in one process.
    """

    def __init__(
        self,
        scene: Scene,
        settings: RanksSettings,
        group: ProcessGroup | None,
        device: torch.device,
        *,
        feed_forward: bool = True,
        interior_first: bool = False,
    ) -> None:
        self.group, self._scene = group, scene
        width, dtype = settings.embed_dim, getattr(torch, settings.dtype)
        raw = scene.coordinates[scene.coordinates[:, -1] == 0][:, :-1]
        values = torch.randn(len(raw), width, generator=torch.Generator().manual_seed(1))
        rank, n_ranks = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        own = raw[rank::n_ranks].to(device), values[rank::n_ranks].to(device, dtype)
        self.pyramid = self._pooled(*(self._scatter(*own) if group else own))
        torch.manual_seed(0)
        layers = [
            EncoderLayer(
                SparseNeighborhoodAttentionBlock(
                    width, settings.n_heads, neighborhood_sizes=scene.windows
                ),
                FeedForward(width) if feed_forward else nn.Identity(),
            )
            for _ in range(settings.layers)
        ]
        self.encoder = Encoder(layers, width).to(device, dtype)
        if group:
            shard_attention(self.encoder, group, interior_first=interior_first)

    def step(self) -> None:
        """Forward and backward pass, planning and the sum of weights' gradients included."""
        self.encoder.zero_grad()
        values = self.pyramid.values.detach().requires_grad_()
        out = self.encoder(self.pyramid.with_values(values)).values
        out.relu().sum().backward()
        if self.group:
            sum_gradients(self.encoder.parameters(), self.group)

    def gradient_norm(self) -> float:
        """Of the first layer's weights of keys and values: what the exchange affects most."""
        attention: Any = self.encoder.layers[0].attention
        return float(attention.kv_proj.weight.grad.double().norm())

    def make_plan(self) -> NeighborhoodPlan:
        """The plan that a step makes."""
        positions, offsets, levels = QueryPlacement.of_points(self.pyramid)
        attention: Any = self.encoder.layers[0].attention
        plan: NeighborhoodPlan = attention.make_plan(positions, offsets, self.pyramid, levels)
        return plan

    def input_bytes(self) -> int:
        """Of the embeddings, the weights and their gradients, which stay between steps."""
        weights = sum(weight.nbytes for weight in self.encoder.parameters())
        return self.pyramid.values.nbytes + self.pyramid.coordinates.nbytes + 2 * weights

    def _pooled(self, cells: Tensor, values: Tensor) -> FeaturePyramid:
        shape = self._scene.level_shapes[0]
        return FeaturePyramid.from_points(cells, values, shape, 1, strides=STRIDES)

    def _scatter(self, cells: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The raw points that this rank owns. A first partition finds weights for the second."""
        shape, align = self._scene.level_shapes[0], STRIDES[-1]
        even = partition_space(cells, shape, self.group, align=align)
        pyramid = self._pooled(*even.scatter(cells, values[:, :1]))
        placed = pyramid.positions(), pyramid.batch_offsets(), pyramid
        plan = plan_sharded(*placed, self._scene.windows, group=self.group)
        weights = plan.counts() + PAIRS_PER_ROW
        strides = torch.tensor(STRIDES, device=cells.device)[pyramid.levels]
        points = torch.cat((pyramid.batch[:, None], pyramid.cells * strides[:, None]), 1)
        part = partition_space(points, shape, self.group, align=align, weights=weights)
        own_cells, own_values = part.scatter(cells, values)
        return own_cells, own_values
