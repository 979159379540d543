"""Blocks, their arguments, and the block of the specification as a loop over queries."""

import math
from typing import Any, NamedTuple

import torch
from problems import OwnOps, Scene, assert_close, make_scene, rotate_by_hand, scene_2d
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
from vicinal._utils.types import BackendName

EMBED, HEADS = 12, 2


EXACT = 1e-10


def make_block(scene: Scene, backend: BackendName | None = "cpu", **options: Any) -> Any:
    """A float64 block for the scene, with random parameters of the layer norm."""
    pyramid = scene.pyramid
    block = SparseNeighborhoodAttentionBlock(
        EMBED,
        HEADS,
        pyramid.n_levels,
        list(scene.sizes),
        pyramid.position_dim,
        **{"rope_enforce_freq_groups_equal": False, "backend": backend} | options,
    ).double()
    with torch.no_grad():
        for parameter in block.norm.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return block


class Arguments(NamedTuple):
    """The arguments of `forward`, with the feature maps as a pyramid."""

    query: Tensor
    query_spatial_positions: Tensor
    query_batch_offsets: Tensor
    stacked_feature_maps: FeaturePyramid
    background_embedding: Tensor | None = None
    query_level_indices: Tensor | None = None
    query_mask: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        leaves = [self.query, self.query_spatial_positions, self.stacked_feature_maps.values]
        return leaves if self.background_embedding is None else [*leaves, self.background_embedding]

    def to(self, dtype: torch.dtype) -> "Arguments":
        """The arguments in another dtype, with the positions in float32."""
        pyramid, background = self.stacked_feature_maps, self.background_embedding
        return self._replace(
            query=self.query.to(dtype),
            query_spatial_positions=self.query_spatial_positions.float(),
            stacked_feature_maps=pyramid.with_values(pyramid.values.to(dtype)),
            background_embedding=None if background is None else background.to(dtype),
        )


def make_arguments(
    scene: Scene,
    *,
    background: bool = False,
    levels: bool = False,
    mask: bool = False,
    seed: int = 0,
    point_dim: int = EMBED,
) -> Arguments:
    """Random arguments; all differentiable ones require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    n, pyramid = len(scene.positions), scene.pyramid
    return Arguments(
        draw(n, EMBED),
        scene.positions.detach().clone().requires_grad_(),
        scene.offsets,
        pyramid.with_values(draw(len(pyramid), point_dim)),
        draw(pyramid.batch_size, pyramid.n_levels, point_dim) if background else None,
        torch.randint(pyramid.n_levels, (n,), generator=generator) if levels else None,
        torch.rand(n, generator=generator) < 0.3 if mask else None,
    )


def specification(block: Any, scene: Scene, arguments: Arguments) -> Tensor:
    """The block as specified, query by query; it projects and rotates every empty cell."""
    query, positions, _, pyramid, background, levels, mask = arguments
    shapes = torch.tensor(pyramid.level_shapes, dtype=torch.float64)
    scales = shapes / shapes.amax(0)
    if levels is None:
        levels = shapes.prod(1).argmax().expand(len(query))

    def project(embedding: Tensor) -> tuple[Tensor, Tensor]:
        key, value = block.kv_proj(embedding).chunk(2, -1)
        return key.unflatten(-1, (HEADS, -1)), value.unflatten(-1, (HEADS, -1))

    def rotate(x: Tensor, positions: Tensor, level: Tensor) -> Tensor:
        if block.pos_encoding is None:
            return x
        return rotate_by_hand(block.pos_encoding, x, torch.cat((positions, level[:, None]), 1))

    def keys_at(keys: Tensor, cells: Tensor, level: Tensor) -> Tensor:
        return rotate(keys, (cells.double() + 0.5) / scales[level], level)

    x = block.norm(query) if block.norm_first else query
    q = rotate(block.q_in_proj(x).unflatten(-1, (HEADS, -1)), positions, levels)
    k, v = project(pyramid.values)
    k = keys_at(k, pyramid.cells, pyramid.levels)
    if block.rotary_values:
        v = keys_at(v, pyramid.cells, pyramid.levels)

    attended = []
    for i, (image, window) in enumerate(zip(scene.images(), scene.windows(), strict=True)):
        unmasked = mask is None or not bool(mask[i])
        neighbors = [point for _, points in window for point in points if unmasked]
        keys_of_query, values = k[neighbors], v[neighbors]
        empty = [slot for slot, points in window if unmasked and not points]
        if background is not None and empty:
            level = torch.tensor([slot.level for slot in empty])
            cells = torch.tensor([slot.cell for slot in empty])
            keys, cell_values = project(background[image, level])
            keys_of_query = torch.cat((keys_of_query, keys_at(keys, cells, level)))
            values = torch.cat((values, cell_values))
        weights = ((q[i] * keys_of_query).sum(-1) / math.sqrt(EMBED // HEADS)).softmax(0)
        attended.append((weights[..., None] * values).sum(0))
    stacked = torch.stack(attended) if attended else query.unflatten(-1, (HEADS, -1)) * 0
    if block.rotary_values:
        stacked = rotate(stacked, -positions, -levels)
    stacked = stacked.flatten(1)
    out: Tensor = query + block.out_proj(stacked)
    return out if block.norm_first else block.norm(out)


def by_weights(block: Any, arguments: Arguments, queries: Tensor | None = None) -> Tensor:
    """The output for ``queries`` (default: all), computed from `attention_weights`."""
    weights = block.attention_weights(**arguments._asdict(), queries=queries)
    chosen = torch.arange(len(arguments.query)) if queries is None else queries
    query, pyramid = arguments.query[chosen], arguments.stacked_feature_maps
    v = block.kv_proj(pyramid.values)[:, EMBED:].unflatten(-1, (HEADS, -1))
    if block.rotary_values:
        places = pyramid.positions(torch.float64), pyramid.levels[:, None]
        v = rotate_by_hand(block.pos_encoding, v, torch.cat(places, 1))
    row = torch.repeat_interleave(weights.offsets.diff())
    attended = query.new_zeros(len(chosen), HEADS, EMBED // HEADS)
    attended = attended.index_add(0, row, weights.weights[..., None] * v[weights.points])
    if arguments.background_embedding is not None:
        offsets = arguments.query_batch_offsets
        image = torch.searchsorted(offsets, chosen, right=True) - 1
        cells = block.kv_proj(arguments.background_embedding)[..., EMBED:]
        cells = cells.unflatten(-1, (HEADS, -1))[image]
        attended = attended + torch.einsum("nlh,nlhd->nhd", weights.background, cells)
    if block.rotary_values:
        assert arguments.query_level_indices is not None
        places = arguments.query_spatial_positions, arguments.query_level_indices[:, None]
        attended = rotate_by_hand(block.pos_encoding, attended, -torch.cat(places, 1)[chosen])
    out: Tensor = query + block.out_proj(attended.flatten(1))
    return out if block.norm_first else block.norm(out)


def gradients(out: Tensor, block: nn.Module, arguments: Arguments) -> list[Tensor]:
    """Gradients of all parameters and arguments for a fixed random cotangent; zero if unused."""
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    leaves = [*block.parameters(), *arguments.leaves()]
    return list(
        torch.autograd.grad(out, leaves, cotangent, allow_unused=True, materialize_grads=True)
    )


def assert_matches_specification(block: Any, scene: Scene, arguments: Arguments) -> Tensor:
    """Compare the output and all gradients with `specification`; return the output."""
    out: Tensor = block(**arguments._asdict())
    expected = specification(block, scene, arguments)
    assert_close(out, expected, EXACT)
    names = [*dict(block.named_parameters()), "query", "positions", "map", "background"]
    for name, left, right in zip(
        names,
        gradients(out, block, arguments),
        gradients(expected, block, arguments),
        strict=False,
    ):
        assert_close(left, right, EXACT, f"gradient of {name}")
    return out.detach()


def coo_arguments(arguments: Arguments) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The call with a sparse COO map, that map, and the pyramid row of each of its entries."""
    pyramid = arguments.stacked_feature_maps
    coo = pyramid.to_coo().detach().requires_grad_()
    rows = {tuple(row): index for index, row in enumerate(pyramid.coordinates.tolist())}
    order = torch.tensor([rows[tuple(row)] for row in coo.detach().indices().t().tolist()])
    call = arguments._asdict() | {
        "stacked_feature_maps": coo,
        "level_spatial_shapes": torch.tensor(pyramid.level_shapes),
    }
    return call, coo, order


def distinct_scene() -> Scene:
    return make_scene(((6, 4), (5, 5), (9, 8)), (3, 5, 3), (6, 0, 8), 60, distinct=True)


def own_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The library's ops with the arguments that a block gives them, forward and backward."""
    scene = scene_2d()
    block = SparseNeighborhoodAttentionBlock(
        12, 2, 3, scene.sizes, dropout=0.3, backend="cpu"
    ).double()
    with OwnOps() as ops:
        plan = scene.plan()
        out = block(
            torch.randn(12, 12, dtype=torch.float64),
            scene.positions.requires_grad_(),
            scene.offsets,
            scene.pyramid.with_values(torch.randn(60, 12, dtype=torch.float64)),
            background_embedding=torch.randn(3, 3, 12, dtype=torch.float64),
            query_mask=torch.arange(12) % 3 == 1,
            plan=plan.with_dropout_ids(torch.arange(12), torch.arange(60), 60),
        )
        out.sum().backward()
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = ops.calls
    return calls
