"""Deformable attention modules, their arguments, and an oracle: `grid_sample` on dense maps."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from problems import Scene, assert_close, make_scene
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseDeformableAttention

EMBED, HEADS, POINTS = 6, 2, 3


EXACT = 1e-12


SCENES = {
    1: make_scene(((7,), (12,), (5,)), (1, 1, 1), (5, 0, 6), 20),
    2: make_scene(((6, 4), (5, 5), (9, 8)), (1, 1, 1), (5, 0, 6), 60),
    3: make_scene(((3, 5, 4), (6, 5, 3)), (1, 1), (5, 0, 6), 70),
}


def make_module(scene: Scene, **options: Any) -> SparseDeformableAttention:
    """A float64 module for the scene; its random parameters make locations depend on queries."""
    pyramid = scene.pyramid
    module = SparseDeformableAttention(
        EMBED, HEADS, pyramid.n_levels, POINTS, pyramid.position_dim, **options
    ).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return module


class Arguments(NamedTuple):
    """The arguments of `forward`, with the feature maps as a pyramid."""

    query: Tensor
    query_spatial_positions: Tensor
    query_batch_offsets: Tensor
    stacked_feature_maps: FeaturePyramid
    background_embedding: Tensor | None = None
    query_mask: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        leaves = [self.query, self.query_spatial_positions, self.stacked_feature_maps.values]
        return leaves if self.background_embedding is None else [*leaves, self.background_embedding]

    def to(self, dtype: torch.dtype) -> "Arguments":
        """The arguments in another dtype, with the positions in float32."""
        pyramid, background = self.stacked_feature_maps, self.background_embedding
        return self._replace(
            query=self.query.detach().to(dtype),
            query_spatial_positions=self.query_spatial_positions.detach().float(),
            stacked_feature_maps=pyramid.with_values(pyramid.values.detach().to(dtype)),
            background_embedding=None if background is None else background.detach().to(dtype),
        )


def make_arguments(scene: Scene, *, background: bool = False, mask: bool = False) -> Arguments:
    """Random arguments; all differentiable ones require gradients."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    n, pyramid = len(scene.positions), scene.pyramid
    # Keep clear of cell borders, where the gradient is discontinuous.
    positions = scene.positions + 0.3 * torch.rand(scene.positions.shape, generator=generator)
    return Arguments(
        draw(n, EMBED),
        positions.requires_grad_(),
        scene.offsets,
        pyramid.with_values(draw(len(pyramid), EMBED)),
        draw(pyramid.batch_size, pyramid.n_levels, EMBED) if background else None,
        torch.rand(n, generator=generator) < 0.3 if mask else None,
    )


def dense_level(
    module: Any, coo: Tensor, image: int, level: int, shape: tuple[int, ...], empty: Tensor
) -> Tensor:
    """``[1, E, *shape]``: the projected map of one level, ``empty`` ``[E]`` in empty cells."""
    indices, embeddings = coo.indices(), coo.values()
    of_level = (indices[0] == image) & (indices[-1] == level)
    cells = tuple(indices[1:-1, of_level])
    dense = empty.expand(*shape, -1).clone()
    dense[cells] = module.value_proj(embeddings[of_level])
    return dense.movedim(-1, 0)[None]


def dense_deformable_attention(module: Any, arguments: Arguments) -> Tensor:
    """The module as `grid_sample` on dense maps, one image and level at a time."""
    query, positions, offsets, pyramid, background, mask = arguments
    coo, dim = pyramid.to_coo(), pyramid.position_dim
    shapes = torch.tensor(pyramid.level_shapes, dtype=torch.float64)
    scales = shapes / shapes.amax(0)
    x = module.norm(query) if module.norm_first else query
    levels = len(shapes)
    shifts = module.offset_proj(x).view(-1, HEADS, levels, POINTS, dim)
    weights = module.weight_proj(x).view(-1, HEADS, levels * POINTS).softmax(-1)
    weights = weights.view(-1, HEADS, levels, POINTS)
    attended = [query.new_zeros(0, EMBED)]
    for image in range(pyramid.batch_size):
        rows = slice(int(offsets[image]), int(offsets[image + 1]))
        total = query.new_zeros(rows.stop - rows.start, HEADS, EMBED // HEADS)
        for level, shape in enumerate(pyramid.level_shapes):
            empty = query.new_zeros(EMBED)
            if background is not None:
                empty = module.value_proj(background[image, level])
            dense = dense_level(module, coo, image, level, shape, empty)
            # Pad the map with background so that no sampling location lies outside.
            margin = 0 if background is None else 12
            wide = empty[:, None].expand(-1, math.prod(size + 2 * margin for size in shape))
            wide = wide.reshape(1, EMBED, *[size + 2 * margin for size in shape]).clone()
            inner = wide
            for axis, size in enumerate(shape, start=2):
                inner = inner.narrow(axis, margin, size)
            inner.copy_(dense)
            location = (positions[rows] * scales[level])[:, None, None] + shifts[rows, :, level]
            inside = (location > 1 - margin) & (location < shapes[level] + margin - 1)
            assert background is None or inside.all()
            grid = 2 * (location + margin) / (shapes[level] + 2 * margin) - 1
            grid = grid.flip(-1).transpose(0, 1)  # [H, n, K, P], the last axis first
            if dim == 1:
                wide, grid = wide[:, :, None], F.pad(grid, (0, 1))
            if dim == 3:
                grid = grid[..., None, :]
            maps = wide.view(HEADS, EMBED // HEADS, *wide.shape[2:])
            sampled = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
            sampled = sampled.flatten(3).flatten(2).view(HEADS, EMBED // HEADS, -1, POINTS)
            total = total + torch.einsum("hcnk,nhk->nhc", sampled, weights[rows, :, level])
        attended.append(total.flatten(1))
    summed = torch.cat(attended)
    if mask is not None:
        summed = summed.masked_fill(mask[:, None], 0)
    out: Tensor = query + module.out_proj(summed)
    return out if module.norm_first else module.norm(out)


def gradients(out: Tensor, module: nn.Module, arguments: Arguments) -> list[Tensor]:
    """Gradients of all parameters and arguments for a fixed random cotangent; zero if unused."""
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    leaves = [*module.parameters(), *arguments.leaves()]
    return list(
        torch.autograd.grad(out, leaves, cotangent, allow_unused=True, materialize_grads=True)
    )


def assert_matches_grid_sample(module: Any, arguments: Arguments) -> None:
    out, expected = module(**arguments._asdict()), dense_deformable_attention(module, arguments)
    assert_close(out, expected, EXACT)
    names = [*dict(module.named_parameters()), "query", "positions", "map", "background"]
    for name, left, right in zip(
        names,
        gradients(out, module, arguments),
        gradients(expected, module, arguments),
        strict=False,
    ):
        assert_close(left, right, 1e-11, f"gradient of {name}")
