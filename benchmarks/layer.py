"""One block on one scene, every point a query, and the work on it that is timed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vicinal
from benchmarks.measure import Call, Timings, Work, time_calls
from benchmarks.outcome import Figures
from benchmarks.scenes import Scene
from vicinal._utils.types import BackendName

CPU = torch.device("cpu")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [N, H, d], k and v [nnz, H, d], projected and rotated -> [N, H, d]."""


@dataclass(eq=False)
class Layer:
    """A block and its inputs: ``x`` [N, E] is both the points' embeddings and the queries.

    Layers of equal options have equal parameters and inputs.
    """

    scene: Scene
    embed_dim: int = 256
    heads: int = 8
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    backend: BackendName | None = None
    relative_bias: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        scene, windows = self.scene, self.scene.windows
        coordinates = scene.coordinates.to(self.device)
        self.x = torch.randn(len(coordinates), self.embed_dim).to(self.device, self.dtype)
        self.pyramid = vicinal.FeaturePyramid(self.x, coordinates, scene.level_shapes, 1)
        positions = self.pyramid.positions  # for other commits: a method or a property
        self.positions = positions() if callable(positions) else positions
        self.offsets = torch.tensor([0, len(self.x)], device=self.device)
        options: dict[str, Any] = {"position_dim": len(scene.level_shapes[0])}
        if self.relative_bias:  # other commits may not have the option
            options["relative_bias"] = True
        self.block = vicinal.SparseNeighborhoodAttentionBlock(
            self.embed_dim, self.heads, len(windows), windows, backend=self.backend, **options
        ).to(self.device, self.dtype)

    def __len__(self) -> int:
        """The number of points, and of queries."""
        return len(self.x)

    def reordered(self, order: Tensor) -> "Layer":
        """The same points, listed in ``order`` [n], with other random embeddings."""
        coordinates = self.scene.coordinates[order.cpu()]
        return replace(self, scene=self.scene._replace(coordinates=coordinates))

    def with_windows(self, windows: Sequence[Any]) -> "Layer":
        """The same points, with other windows."""
        return replace(self, scene=self.scene._replace(windows=tuple(windows)))

    def time(self, calls: Mapping[str, Call], repeats: int) -> Timings:
        return time_calls(calls, repeats, self.device)

    def make_plan(self) -> vicinal.NeighborhoodPlan:
        windows = self.scene.windows
        return vicinal.plan_neighborhoods(self.positions, self.offsets, self.pyramid, windows)

    @torch.no_grad()
    def make_forward_plan(self) -> vicinal.NeighborhoodPlan:
        """On a GPU, a plan without what a backward pass needs."""
        return self.make_plan()

    @cached_property
    def plan(self) -> vicinal.NeighborhoodPlan:
        return self.make_plan()

    @cached_property
    def n_pairs(self) -> int:
        """The number of pairs of a query and one of its neighbors."""
        return int(self.plan.counts().sum())

    @property
    def figures(self) -> Figures:
        return {"points": len(self), "neighbors": self.n_pairs / len(self)}

    def forward(self, x: Tensor, plan: vicinal.NeighborhoodPlan | None = None) -> Tensor:
        """The whole block, planning included unless ``plan`` is given."""
        pyramid = self.pyramid.with_values(x)
        out: Tensor = self.block(x, self.positions, self.offsets, pyramid, plan=plan)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The library's attention alone."""
        return vicinal.neighborhood_attention(q, k, v, self.plan, backend=self.backend)

    def whole(self, plan: vicinal.NeighborhoodPlan | None = None) -> Work:
        """The block with all its parameters, planning included unless ``plan`` is given."""
        return Work(partial(self.forward, plan=plan), (self.x,), tuple(self.block.parameters()))

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
        block, heads = self.block, (self.heads, -1)
        q = block.q_in_proj(block.norm(x)).unflatten(-1, heads)
        k, v = (F.linear(x, part).unflatten(-1, heads) for part in block.kv_proj.weight.chunk(2))
        rotate = block.pos_encoding
        return rotate(q, self.query_coordinates), rotate(k, self.point_coordinates), v

    def around(self, attend: Attend) -> Callable[[Tensor], Tensor]:
        """The block around another attention. Must match `forward` with `attend`."""
        return lambda x: x + self.block.out_proj(attend(*self.projected(x)).flatten(1))
