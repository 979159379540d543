"""One block on one scene, every point a query, and the work on it that is timed."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Work
from benchmarks.scenes import Scene
from vicinal import (
    FeaturePyramid,
    NeighborhoodPlan,
    SparseNeighborhoodAttentionBlock,
    neighborhood_attention,
    plan_neighborhoods,
)

EMBED_DIM, HEADS = 256, 8

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [N, H, d], k and v [nnz, H, d], projected and rotated -> [N, H, d]."""


class Layer:
    """A block and its inputs: ``x`` [N, E] is both the points' embeddings and the queries."""

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
        self.scene, self.device = scene, torch.device(device)
        self.x = torch.randn(len(scene.coordinates), embed_dim).to(device, dtype)
        coordinates = scene.coordinates.to(device)
        self.pyramid = FeaturePyramid(self.x, coordinates, scene.level_shapes, 1)
        positions = self.pyramid.positions  # for other commits: a method or a property
        self.positions = positions() if callable(positions) else positions
        self.offsets = torch.tensor([0, len(self.x)], device=device)
        windows, dim = scene.windows, len(scene.level_shapes[0])
        self.block = SparseNeighborhoodAttentionBlock(
            embed_dim, heads, len(windows), windows, position_dim=dim, backend=backend
        ).to(device, dtype)

    def __len__(self) -> int:
        """The number of points, and of queries."""
        return len(self.x)

    def with_backend(self, backend: str) -> "Layer":
        """The same numbers on a back end of the library by name."""
        other = copy.copy(self)
        other.block = copy.deepcopy(self.block)
        other.block.backend = other.block.pos_encoding.backend = backend
        return other

    def reordered(self, order: Tensor) -> "Layer":
        """The same points, listed in ``order`` [n], with other random embeddings."""
        block, x = self.block, self.x
        options: dict[str, Any] = {"embed_dim": block.embed_dim, "heads": block.n_heads}
        options |= {"dtype": x.dtype, "device": x.device, "backend": block.backend}
        coordinates = self.scene.coordinates[order.cpu()]
        return Layer(self.scene._replace(coordinates=coordinates), **options)

    def make_plan(self) -> NeighborhoodPlan:
        return plan_neighborhoods(self.positions, self.offsets, self.pyramid, self.scene.windows)

    @torch.no_grad()
    def make_forward_plan(self) -> NeighborhoodPlan:
        """On a GPU, a plan without what a backward pass needs."""
        return self.make_plan()

    @cached_property
    def plan(self) -> NeighborhoodPlan:
        return self.make_plan()

    @cached_property
    def n_pairs(self) -> int:
        """The number of pairs of a query and one of its neighbors."""
        return int(self.plan.counts().sum())

    @property
    def figures(self) -> dict[str, float | str]:
        return {"points": len(self), "neighbors": self.n_pairs / len(self)}

    def forward(self, x: Tensor, plan: NeighborhoodPlan | None = None) -> Tensor:
        """The whole block, planning included unless ``plan`` is given."""
        out: Tensor = self.block(
            x, self.positions, self.offsets, self.pyramid.with_values(x), plan=plan
        )
        return out

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: NeighborhoodPlan | None = None
    ) -> Tensor:
        """The library's attention alone; by default with the plan of all points."""
        plan = self.plan if plan is None else plan
        return neighborhood_attention(q, k, v, plan, backend=self.block.backend)

    def whole(self) -> Work:
        """The block with all its parameters, planning included."""
        return Work(self.forward, (self.x,), tuple(self.block.parameters()))

    def planned(self) -> Work:
        """The same with its plan given."""
        return replace(self.whole(), compute=partial(self.forward, plan=self.plan))

    def floor(self) -> Work:
        """The GEMM floor: the block's dense projections alone."""
        parts = (self.block.q_in_proj, self.block.kv_proj, self.block.out_proj)
        weights = tuple(part.weight for part in parts)
        return Work(lambda x: tuple(F.linear(x, w) for w in weights), (self.x,), weights)

    def attention(self) -> Work:
        """The attention alone: q, k, v and the plan given."""
        with torch.no_grad():
            q, k, v = (part.contiguous() for part in self.projected(self.x))
        return Work(self.attend, (q, k, v))

    @cached_property
    def query_coordinates(self) -> Tensor:
        """[N, P + 1]: positions and level 0, the block's default for queries."""
        return F.pad(self.positions, (0, 1))

    @cached_property
    def point_coordinates(self) -> Tensor:
        """[nnz, P + 1]: positions and levels."""
        return torch.cat((self.positions, self.pyramid.levels[:, None]), 1)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, k and v [N, H, d] of ``x``, projected and rotated, as the attention gets them."""
        block, heads = self.block, (self.block.n_heads, -1)
        q = block.q_in_proj(block.norm(x)).unflatten(-1, heads)
        k, v = (F.linear(x, part).unflatten(-1, heads) for part in block.kv_proj.weight.chunk(2))
        rotate = block.pos_encoding
        return rotate(q, self.query_coordinates), rotate(k, self.point_coordinates), v

    def around(self, attend: Attend) -> Callable[[Tensor], Tensor]:
        """The block around another attention. Must match `forward` with `attend`."""

        def forward(x: Tensor) -> Tensor:
            out: Tensor = x + self.block.out_proj(attend(*self.projected(x)).flatten(1))
            return out

        return forward

    def on_sparse_map(self, block: nn.Module | Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        """A function of ``x`` that gives ``block`` a sparse COO map."""
        shapes = torch.tensor(self.pyramid.level_shapes)

        def forward(x: Tensor) -> Tensor:
            maps = self.pyramid.with_values(x).to_coo()
            out: Tensor = block(x, self.positions, self.offsets, maps, shapes)
            return out

        return forward
