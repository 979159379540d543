"""The U-Net against its parts by hand, and what its logits do not depend on."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from detr_scenes import gradients, perturbed, refused
from problems import assert_close
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseDeformableAttention, Window
from vicinal._pyramid import data, sources
from vicinal.nets import PointUNet

CHANNELS, CLASSES = 2, 3
EXACT = 1e-11
# By number of dimensions: sizes of the grid, and of the stem's windows.
SHAPES: dict[int, tuple[int, ...]] = {1: (64,), 2: (24, 32), 3: (8, 12, 8), 4: (4, 4, 8, 4)}
OPTIONS: dict[str, Any] = {
    **{"embed_dims": (8, 12, 16), "n_heads": 2, "strides": (1, 2, 4)},
    **{"neighborhood_sizes": (3, 5, 3), "depths": (1, 2, 1)},
    **{"stem_window_sizes": (3, 3), "stem_window_strides": (1, 2)},
}


def make_net(position_dim: int = 2, **options: Any) -> PointUNet:
    torch.manual_seed(0)
    net = PointUNet(CHANNELS, CLASSES, position_dim=position_dim, **{**OPTIONS, **options})
    return perturbed(net)


def random_points(shape: Sequence[int], n: int = 80, images: Sequence[int] = (0, 2)) -> Any:
    """Points in random order, some of which share a cell, on these images alone."""
    torch.manual_seed(1)
    image = torch.tensor(images)[torch.randint(len(images), (n,))]
    axes = [torch.randint(size, (n,)) for size in shape]
    return torch.stack((image, *axes), 1), torch.randn(n, CHANNELS, dtype=torch.float64)


def run_stage(
    stage: Any, values: Tensor, cells: list[tuple[int, ...]], shape: Sequence[int], n_images: int
) -> Tensor:
    """The layers of a stage, each with a plan of its own."""
    coordinates = torch.tensor([(*cell, 0) for cell in cells])
    points = FeaturePyramid(values, coordinates, (tuple(shape),), n_images)
    for layer in stage:
        values = layer(values, points, points.positions(torch.float64), points.batch_offsets())
    return values


def by_hand(
    net: PointUNet, coordinates: Tensor, values: Tensor, shape: Sequence[int], n_images: int
) -> Tensor:
    """Cells and their parents from dictionaries, features one cell at a time."""
    net_: Any = net
    stem = net.stem(coordinates, values, shape, n_images)
    cells, stem_values = [], []
    for level in range(stem.n_levels):
        rows = stem.levels == level
        cells.append(list(map(tuple, stem.coordinates[rows, :-1].tolist())))
        stem_values.append(stem.values[rows])

    def parent(cell: tuple[int, ...], fine: int) -> int:
        steps = zip(net.strides[fine + 1], net.strides[fine], strict=True)
        ratio = [coarse // fine for coarse, fine in steps]
        own = tuple(x // r for x, r in zip(cell[1:], ratio, strict=True))
        return cells[fine + 1].index((cell[0], *own))

    parents = [
        torch.tensor([parent(cell, fine) for cell in cells[fine]])
        for fine in range(stem.n_levels - 1)
    ]
    down: list[Tensor] = []
    for level, shape_of_level in enumerate(stem.level_shapes):
        x = stem_values[level]
        if level:
            means = [down[-1][parents[level - 1] == row].mean(0) for row in range(len(x))]
            x = net_.down[level - 1](torch.cat((torch.stack(means), x), 1))
        down.append(run_stage(net.encoder[level], x, cells[level], shape_of_level, n_images))
    x = down[-1]
    for level in reversed(range(stem.n_levels - 1)):
        x = down[level] + net_.up[level](x)[parents[level]]
        x = run_stage(net.decoder[level], x, cells[level], stem.level_shapes[level], n_images)
    finest = [
        (image, *(x // step for x, step in zip(cell, net.strides[0], strict=True)))
        for image, *cell in coordinates.tolist()
    ]
    logits: Tensor = net_.head(x)[[cells[0].index(cell) for cell in finest]]
    return logits


@pytest.mark.parametrize(
    ("position_dim", "options"),
    [
        (1, {}),
        (2, {}),
        (2, {"strides": (2, 2, 6)}),
        (2, {"strides": ((1, 2), (1, 4), (3, 8)), "depths": (0, 1, 0)}),
        (2, {"strides": 1, "embed_dims": 8, "neighborhood_sizes": (5,), "depths": 1}),
        (3, {"neighborhood_sizes": ((3, 5, 1), Window(3, shape="ball"), 3)}),
        (4, {}),
    ],
)
def test_matches_its_parts_by_hand(position_dim: int, options: dict[str, Any]) -> None:
    net, shape = make_net(position_dim, **options), SHAPES[position_dim]
    coordinates, values = random_points(shape)
    assert len(coordinates.unique(dim=0)) < len(coordinates)  # cells are shared
    logits = net(coordinates, values, shape, 4)
    assert logits.shape == (len(coordinates), CLASSES)
    assert_close(logits, by_hand(net, coordinates, values, shape, 4), EXACT)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_reach_the_values_and_all_parameters(checkpoint: bool) -> None:
    net = make_net(checkpoint=checkpoint)
    coordinates, values = random_points(SHAPES[2])
    values.requires_grad_()
    nn.functional.cross_entropy(
        net(coordinates, values, SHAPES[2], 3), torch.arange(len(values)) % CLASSES
    ).backward()
    assert values.grad is not None
    assert values.grad.any(1).all()
    for name, grad in gradients(net).items():
        assert grad is not None, name
        # A constant added to all keys of a query changes no weight.
        assert grad.abs().max() > 1e-12 or name.endswith("kv_proj.bias"), name


def test_gradients_are_those_of_differences() -> None:
    net = make_net(embed_dims=4, strides=(1, 2), neighborhood_sizes=(3, 3), depths=1)
    coordinates, values = random_points((6, 6), 10)
    values.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: net(coordinates, v, (6, 6), 3), values, fast_mode=True
    )


def test_checkpointing_changes_no_bit() -> None:
    results = []
    for checkpoint in (False, True):
        net = make_net(checkpoint=checkpoint, dropout=0.2)
        coordinates, values = random_points(SHAPES[2])
        torch.manual_seed(3)
        out = net(coordinates, values, SHAPES[2], 3)
        out.square().sum().backward()
        results.append([out, *gradients(net).values()])
    for plain, again in zip(*results, strict=True):
        assert plain is not None
        assert again is not None
        assert torch.equal(plain, again)


def test_scenes_in_a_batch_give_what_each_gives_alone() -> None:
    net = make_net()
    coordinates, values = random_points(SHAPES[2], images=(0, 1, 3))
    logits = net(coordinates, values, SHAPES[2], 5)
    for image in range(5):
        own = coordinates[:, 0] == image
        alone = coordinates[own] - torch.tensor([image, 0, 0])
        assert_close(net(alone, values[own], SHAPES[2], 1), logits[own], EXACT)


def test_the_order_of_points_and_the_size_of_the_grid_do_not_matter() -> None:
    net = make_net()
    coordinates, values = random_points(SHAPES[2])
    logits = net(coordinates, values, SHAPES[2], 3)
    order = torch.randperm(len(values))
    assert_close(net(coordinates[order], values[order], SHAPES[2], 3), logits[order], EXACT)
    assert_close(net(coordinates, values, (61, 47), 3), logits, EXACT)


@pytest.mark.parametrize("axis", [0, 1])
def test_logits_turn_with_a_periodic_axis(axis: int) -> None:
    """By whole cells of the coarsest level: others are pooled apart."""
    net, shape = make_net(), SHAPES[2]
    coordinates, values = random_points(shape)
    logits = net(coordinates, values, shape, 3, periodic_axes=(axis,))
    assert (logits - net(coordinates, values, shape, 3)).abs().max() > 1e-6  # around the seam
    for cells in (4, 12, 20):
        turned = coordinates.clone()
        turned[:, 1 + axis] = (turned[:, 1 + axis] + cells) % shape[axis]
        assert_close(net(turned, values, shape, 3, periodic_axes=(axis,)), logits, EXACT)


@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_no_points_at_all(batch_size: int) -> None:
    net = make_net()
    empty = torch.empty(0, 3, dtype=torch.int64), torch.empty(0, CHANNELS, dtype=torch.float64)
    logits = net(*empty, SHAPES[2], batch_size)
    assert logits.shape == (0, CLASSES)
    logits.sum().backward()


def test_one_point() -> None:
    net = make_net()
    logits = net(torch.tensor([[1, 5, 5]]), torch.ones(1, CHANNELS).double(), SHAPES[2], 2)
    assert logits.isfinite().all()


def test_levels_without_layers_hold_points() -> None:
    net = make_net(depths=0)
    assert not any(isinstance(module, nn.ModuleList) and len(module) for module in net.encoder)
    coordinates, values = random_points(SHAPES[2])
    assert net(coordinates, values, SHAPES[2], 3).isfinite().all()


@torch.no_grad()
def test_values_tell_where_neighbors_lie() -> None:
    block: Any = make_net().get_submodule("encoder.0.0.attention")
    nn.init.zeros_(block.q_in_proj.weight)
    nn.init.zeros_(block.q_in_proj.bias)  # all neighbors have the same weight
    values = torch.randn(2, block.embed_dim, dtype=torch.float64)

    def beside(column: int) -> Tensor:
        """The row of a point in column 2 that has one neighbor."""
        coordinates = torch.tensor([[0, 2, 2, 0], [0, 2, column, 0]])
        out: Tensor = block.encode(FeaturePyramid(values, coordinates, ((5, 5),), 1)).values
        return out[0]

    assert (beside(1) - beside(3)).abs().max() > 1e-3


def test_another_attention_takes_the_place_of_the_block() -> None:
    made = []

    def make_attention(level: int) -> nn.Module:
        made.append(level)
        return SparseDeformableAttention(OPTIONS["embed_dims"][level], 2, 1, 4)

    net = make_net(make_attention=make_attention, neighborhood_sizes=())
    assert sorted(made) == [0, 0, 1, 1, 1, 1, 2]
    coordinates, values = random_points(SHAPES[2])
    assert net(coordinates, values, SHAPES[2], 3).isfinite().all()
    with refused("make_attention"):
        make_net(make_attention=lambda level: None)


def test_autocast_and_half_precision_stay_close() -> None:
    net = make_net().float()
    coordinates, values = random_points(SHAPES[2])
    expected = net(coordinates, values.float(), SHAPES[2], 3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(coordinates, values.float(), SHAPES[2], 3)
    assert mixed.dtype == torch.bfloat16
    narrow = net.bfloat16()(coordinates, values.bfloat16(), SHAPES[2], 3)
    assert narrow.dtype == torch.bfloat16
    scale = expected.abs().max()
    for half in (mixed, narrow):
        assert (half.float() - expected).abs().max() < 0.1 * scale


def test_names_of_parameters_stay() -> None:
    net = PointUNet(1, 2, 8, 2, (1, 2), (3, 3))
    parts = [name.rpartition(".")[0] for name in net.state_dict() if not name.startswith("stem.")]
    layer = [
        *("attention.norm", "attention.q_in_proj", "attention.pos_encoding.freqs"),
        *("attention.kv_proj", "attention.out_proj"),
        *("feed_forward.norm", "feed_forward.layers.0", "feed_forward.layers.3"),
    ]
    stages = [("encoder.0.0", layer), ("encoder.1.0", layer)]
    expected = [f"{stage}.{name}" for stage, names in stages for name in names]
    expected += ["down.0.norm", "down.0.linear", "up.0.norm", "up.0.linear"]
    expected += [f"decoder.0.0.{name}" for name in layer] + ["head.norm", "head.linear"]
    assert list(dict.fromkeys(parts)) == expected
    other = PointUNet(1, 2, 8, 2, (1, 2), (3, 3))
    other.load_state_dict(net.state_dict())


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("embed_dims", {"embed_dims": 0}),
        ("embed_dims", {"embed_dims": ()}),
        ("embed_dims", {"embed_dims": (8, 8)}),
        ("embed_dims", {"embed_dims": "8"}),
        ("embed_dims", {"n_heads": 3}),
        ("n_heads", {"n_heads": (2, 2)}),
        ("depths", {"depths": (1, -1, 1)}),
        ("depths", {"depths": 1.5}),
        ("strides", {"strides": (1, 2, 3)}),
        ("strides", {"strides": (4, 2, 1)}),
        ("strides", {"strides": (1, 0, 2)}),
        ("neighborhood_sizes", {"neighborhood_sizes": (3, 3)}),
        ("neighborhood_sizes", {"neighborhood_sizes": (3, 0, 3)}),
        ("stem_window_sizes", {"stem_window_sizes": (4, 4)}),
        ("stem_window_sizes", {"stem_window_sizes": (3,), "stem_window_strides": (1, 2)}),
        ("stem_window_strides", {"stem_window_strides": (2, 4)}),
        ("make_attention", {"make_attention": 5}),
        ("make_attention", {"make_attention": lambda level: nn.Linear(8, 8)}),
        ("dropout", {"dropout": 1.0}),
        ("position_dim", {"position_dim": 0}),
    ],
)
def test_refuses_wrong_sizes(argument: str, options: dict[str, Any]) -> None:
    with refused(argument):
        PointUNet(CHANNELS, CLASSES, **{**OPTIONS, **options})


def test_refused_windows_are_named_by_their_level() -> None:
    net = make_net(neighborhood_sizes=(3, 5, 7))
    coordinates, values = random_points((16, 32))
    with pytest.raises(ValueError, match=r"neighborhood_sizes: expected .* at level 2 along"):
        net(coordinates, values, (16, 32), 3, periodic_axes=(0,))  # of 4 cells at level 2


def test_refuses_wrong_counts_and_inputs() -> None:
    with refused("n_classes"):
        PointUNet(CHANNELS, 0, **OPTIONS)
    with refused("in_channels"):
        PointUNet(0, CLASSES, **OPTIONS)
    net = make_net()
    coordinates, values = random_points(SHAPES[2])
    with refused("values"):
        net(coordinates, values[:, :1], SHAPES[2], 3)
    with refused("values", "float32"):
        net(coordinates, values.float(), SHAPES[2], 3)
    with refused("coordinates"):
        net(coordinates[:, :2], values, SHAPES[2], 3)
    with refused("spatial_shape"):
        net(coordinates, values, (24, 32, 8), 3)
    with refused("spatial_shape"):
        net(coordinates, values, (26, 32), 3, periodic_axes=(0,))


def test_compiled_layers_of_a_level_share_a_graph() -> None:
    """No layer gets one tensor twice, or views where another does not: `torch.compile` asks."""
    net: Any = make_net(depths=2)
    kinds: set[tuple[bool, ...]] = set()

    def note_kind(_: nn.Module, arguments: Any) -> None:
        values, points, *_ = arguments
        kinds.add((values is points.values, values._is_view(), points.values._is_view()))

    for stage in (*net.encoder, *net.decoder):
        for layer in stage:
            layer.register_forward_pre_hook(note_kind)
    net(*random_points(SHAPES[2]), SHAPES[2], 3)
    assert kinds == {(False, False, True)}


def test_levels_without_layers_need_no_heads_and_windows() -> None:
    net = make_net(embed_dims=(9, 12, 16), neighborhood_sizes=(33, 5, 3), depths=(0, 1, 1))
    coordinates, values = random_points((16, 32))
    assert net(coordinates, values, (16, 32), 3, periodic_axes=(0,)).isfinite().all()


@pytest.mark.parametrize("n_outside", [1, 80])
def test_unchecked_points_outside_affect_no_other(
    n_outside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where contents are not validated."""
    net = make_net().eval()
    coordinates, values = random_points(SHAPES[2])
    expected = net(coordinates[n_outside:], values[n_outside:], SHAPES[2], 3)
    coordinates[:n_outside, 1] = SHAPES[2][0]
    for module in (data, sources):
        monkeypatch.setattr(module, "reads_contents", lambda *_: False)
    pyramid = net.stem(coordinates, values, SHAPES[2], 3, keep_point_rows=True)
    assert pyramid.point_rows is not None
    assert (pyramid.point_rows[:n_outside] == -1).all()
    logits = net(coordinates, values, SHAPES[2], 3)
    assert not logits[:n_outside].any()
    assert_close(logits[n_outside:], expected, EXACT)
