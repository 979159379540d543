"""One block on one scene, every point a query, and the works on it that are timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.scenes import Scene
from benchmarks.work import Work
from vicinal import (
    FeaturePyramid,
    NeighborhoodPlan,
    SparseNeighborhoodAttentionBlock,
    neighborhood_attention,
    plan_neighborhoods,
)

EMBED_DIM, HEADS = 256, 8

Block = TypeVar("Block", bound=nn.Module)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [N, H, d], k and v [nnz, H, d], projected and rotated -> [N, H, d]."""


class Layer:
    """A block and what it takes: ``x`` [N, E], the points' embeddings and the queries at once."""

    def __init__(
        self,
        scene: Scene,
        *,
        embed_dim: int = EMBED_DIM,
        heads: int = HEADS,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        backend: str | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.scene = scene
        self.x = torch.randn(len(scene.coordinates), embed_dim).to(device, dtype)
        coordinates = scene.coordinates.to(device)
        self.pyramid = FeaturePyramid(self.x, coordinates, scene.level_shapes, 1)
        self.positions = self.pyramid.positions()
        self.offsets = torch.tensor([0, len(self.x)], device=device)
        kind = partial(SparseNeighborhoodAttentionBlock, backend=backend)
        self.block = self.make_block(kind, embed_dim, heads).to(device, dtype)

    def make_block(self, kind: Callable[..., Block], embed_dim: int, heads: int) -> Block:
        """A block for the scene, of the library's kind or of a peer's."""
        windows, dim = self.scene.windows, len(self.scene.level_shapes[0])
        return kind(embed_dim, heads, len(windows), windows, position_dim=dim)

    def __len__(self) -> int:
        """The number of points, and of queries."""
        return len(self.x)

    @property
    def sizes(self) -> tuple[int, int]:
        """Embedding width and number of heads."""
        return self.block.embed_dim, self.block.n_heads

    @property
    def x_bytes(self) -> int:
        return self.x.numel() * self.x.element_size()

    def with_dtype(self, dtype: torch.dtype, backend: str | None = None) -> Layer:
        """The same numbers, rounded to ``dtype``, on a back end of the library by name."""
        other = copy.copy(self)
        other.x = self.x.to(dtype)
        other.block = copy.deepcopy(self.block).to(dtype)
        other.block.backend = other.block.pos_encoding.backend = backend
        return other

    def reordered(self, order: Tensor) -> Layer:
        """The same points, listed in ``order`` [n]; their embeddings are drawn anew."""
        scene = self.scene._replace(coordinates=self.scene.coordinates[order.cpu()])
        embed_dim, heads = self.sizes
        return Layer(
            scene,
            embed_dim=embed_dim,
            heads=heads,
            dtype=self.x.dtype,
            device=self.x.device,
            backend=self.block.backend,
        )

    def make_plan(self) -> NeighborhoodPlan:
        return plan_neighborhoods(self.positions, self.offsets, self.pyramid, self.scene.windows)

    @cached_property
    def plan(self) -> NeighborhoodPlan:
        return self.make_plan()

    @cached_property
    def n_pairs(self) -> int:
        """How many (query, point) there are of which the query sees the point."""
        return int(self.plan.counts().sum())

    def forward(self, x: Tensor, plan: NeighborhoodPlan | None = None) -> Tensor:
        """The whole block, planning included unless ``plan`` is given."""
        out: Tensor = self.block(
            x, self.positions, self.offsets, self.pyramid.with_values(x), plan=plan
        )
        return out

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        """The block's dense projections alone."""
        parts = (self.block.q_in_proj, self.block.kv_proj, self.block.out_proj)
        return tuple(F.linear(x, part.weight) for part in parts)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: NeighborhoodPlan | None = None
    ) -> Tensor:
        """The library's attention alone, its plan made before; None: that of all points."""
        plan = self.plan if plan is None else plan
        return neighborhood_attention(q, k, v, plan, backend=self.block.backend)

    def whole(self) -> Work:
        """The block with all its parameters, planning included."""
        return Work(self.forward, (self.x,), tuple(self.block.parameters()))

    def planned(self) -> Work:
        """The same, its plan made before."""
        return replace(self.whole(), compute=partial(self.forward, plan=self.plan))

    def floor(self) -> Work:
        """The dense projections and their weights: the GEMM floor."""
        block = self.block
        weights = (block.q_in_proj.weight, block.kv_proj.weight, block.out_proj.weight)
        return Work(self.projections, (self.x,), weights)

    def attention(self) -> Work:
        """The attention alone: q, k and v given, projected and rotated, and the plan as well."""
        return Work(self.attend, self.operands())

    @cached_property
    def query_coordinates(self) -> Tensor:
        """[N, P + 1]: positions and level 0, the finest, where all queries live."""
        return F.pad(self.positions, (0, 1))

    @cached_property
    def point_coordinates(self) -> Tensor:
        """[nnz, P + 1]: positions and levels."""
        return torch.cat((self.positions, self.pyramid.levels[:, None]), 1)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, k and v [N, H, d] of ``x``, rotated: what the attention takes."""
        heads = (self.block.n_heads, -1)
        q = self.block.q_in_proj(self.block.norm(x)).unflatten(-1, heads)
        k, v = (
            F.linear(x, part).unflatten(-1, heads) for part in self.block.kv_proj.weight.chunk(2)
        )
        rotate = self.block.pos_encoding
        return rotate(q, self.query_coordinates), rotate(k, self.point_coordinates), v

    @torch.no_grad()
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q, k and v of the layer's own ``x``, each in memory of its own."""
        q, k, v = (part.contiguous() for part in self.projected(self.x))
        return q, k, v

    def around(self, attend: Attend) -> Callable[[Tensor], Tensor]:
        """The block around another attention. Must match `forward` with `attend`."""

        def forward(x: Tensor) -> Tensor:
            attended = attend(*self.projected(x)).flatten(1)
            out: Tensor = x + self.block.out_proj(attended)
            return out

        return forward

    def on_sparse_map(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        """``block`` on a sparse COO map, which both the library's and its peer understand."""
        shapes = torch.tensor(self.pyramid.level_shapes)

        def forward(x: Tensor) -> Tensor:
            maps = self.pyramid.with_values(x).to_coo()
            out: Tensor = block(x, self.positions, self.offsets, maps, shapes)
            return out

        return forward
