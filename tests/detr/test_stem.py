"""The stem against a dense map cut into windows, and what it does not depend on."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from detr_scenes import EMBED, refused, stir
from problems import assert_close
from torch import Tensor

from vicinal import FeaturePyramid, Window
from vicinal.detr import PointStem

CHANNELS = 2
EXACT = 1e-11
Cell = Sequence[int]


def make_stem(position_dim: Any, **options: Any) -> PointStem:
    stem = PointStem(CHANNELS, EMBED, position_dim=position_dim, **options).double()
    stir(stem)
    return stem


def random_points(
    shape: Sequence[int], batch_size: int, n: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Points in random order, some of which share a cell; the last image has none."""
    generator = torch.Generator().manual_seed(seed)
    images = max(batch_size - 1, 1)
    axes = [torch.randint(size, (n,), generator=generator) for size in (images, *shape)]
    return torch.stack(axes, 1), torch.randn(n, CHANNELS, generator=generator, dtype=torch.float64)


def pooled(cell: Cell, stride: Cell) -> tuple[int, ...]:
    """The cell of ``stride`` that contains a cell of the grid."""
    return tuple(x // step for x, step in zip(cell, stride, strict=True))


def pooled_map(
    coordinates: Tensor, values: Tensor, shape: Sequence[int], batch_size: int, stride: Cell
) -> Tensor:
    """Dense ``[B, *shape / stride, C + 1]``: the mean of the points in a cell, and whether any."""
    grid = [-(-size // step) for size, step in zip(shape, stride, strict=True)]
    dense = torch.zeros(batch_size, *grid, values.shape[1] + 1, dtype=values.dtype)
    points: dict[tuple[int, ...], list[Tensor]] = {}
    for (image, *cell), value in zip(coordinates.tolist(), values, strict=True):
        points.setdefault((image, *pooled(cell, stride)), []).append(value)
    for cell, cell_values in points.items():
        mean = torch.stack(cell_values).mean(0)
        dense[cell] = torch.cat((mean, torch.ones(1, dtype=values.dtype)))
    return dense


def as_axes(value: Any, dim: int) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,) * dim


def window_cells(size: Any, cell: Cell, stride: Cell) -> Iterator[list[int]]:
    """The cells of a window of ``stride`` around ``cell`` of the grid, by the definition."""
    shape, dim = size if isinstance(size, Window) else Window(size), len(cell)
    widths, dilations = as_axes(shape.size, dim), as_axes(shape.dilation, dim)
    centers, steps, halves = [], [], []
    for axis, causal in enumerate(as_axes(shape.causal, dim)):
        width, end = widths[axis], cell[axis] + 1
        # Along a causal axis: back from the last cell that is complete when the own cell ends.
        centers.append(end // stride[axis] - 1 if causal else cell[axis] // stride[axis])
        steps.append(range(1 - width, 1) if causal else range(-(width // 2), width // 2 + 1))
        halves.append(width - 0.5 if causal else width / 2)
    for offset in itertools.product(*steps) if min(widths) else ():
        if shape.shape == "box" or sum(map(lambda o, h: (o / h) ** 2, offset, halves)) <= 1:
            yield [c + d * o for c, d, o in zip(centers, dilations, offset, strict=True)]


def window(
    dense: Tensor, image: int, around: Cell, size: Any, stride: Cell, periodic: Cell = ()
) -> Tensor:
    """The cells of a window one after another, zeros beyond the map, or around its seam."""
    cells = [dense.new_empty(0)]
    for cell in window_cells(size, around, stride):
        for axis in periodic:
            cell[axis] %= dense.shape[1 + axis]
        inside = all(0 <= x < size for x, size in zip(cell, dense.shape[1:-1], strict=True))
        cells.append(dense[(image, *cell)] if inside else dense.new_zeros(dense.shape[-1]))
    return torch.cat(cells)


def stem_by_hand(
    stem: PointStem,
    coordinates: Tensor,
    values: Tensor,
    shape: Sequence[int],
    batch_size: int,
    periodic: Cell = (),
) -> dict[tuple[int, ...], Tensor]:
    """Embeddings by (image, cell, level)."""
    maps = [
        pooled_map(coordinates, values, shape, batch_size, stride) for stride in stem.window_strides
    ]
    embedded: dict[tuple[int, ...], Tensor] = {}
    for image, *cell in set(map(tuple, coordinates.tolist())):
        windows = [
            window(dense, image, cell, size, stride, periodic)
            for dense, stride, size in zip(
                maps, stem.window_strides, stem.window_sizes, strict=True
            )
        ]
        within = [
            (x % stride[axis] + 0.5) / stride[axis] - 0.5
            for axis, x in enumerate(cell)
            for stride in stem.strides
        ]
        features = torch.cat((*windows, torch.tensor(within, dtype=torch.float64)))
        embedded[(image, *cell)] = stem.layers(features)
    out = {}
    for level, (stride, mix) in enumerate(zip(stem.strides, stem.mixes, strict=True)):
        parts: dict[tuple[int, ...], list[Tensor]] = {}
        for (image, *cell), embedding in embedded.items():
            parts.setdefault((image, *pooled(cell, stride)), []).append(embedding)
        for cell_key, embeddings in parts.items():
            out[(*cell_key, level)] = stem.norm(mix(torch.stack(embeddings).mean(0)))
    return out


@pytest.mark.parametrize(
    ("shape", "n", "strides", "sizes", "window_strides"),
    [
        ((24,), 15, (1, 4), (5, 3), (1, 2)),
        ((8, 12), 40, (2, 4), (3, 5), (1, 4)),
        ((8, 12), 40, (1,), (3,), (1,)),
        ((4, 8, 4), 60, (1, 2, 4), (3, 3), (1, 2)),
        ((25,), 15, (4, 8, 16), (5, 3), (1, 3)),
        ((9, 13), 40, (2, 4), (3, 5), (1, 4)),
        ((9, 13), 40, ((1, 2), (3, 4)), (3, 5), (1, (2, 3))),
        ((5, 7, 6), 60, ((8, 2, 2), (16, 4, 8)), (3, 3), (1, (2, 1, 3))),
        ((25,), 15, (1, 2), (Window(4, causal=True), Window(2, causal=True)), (1, 3)),
        ((8, 12), 40, (2, 4), ((3, 1), Window((3, 5), dilation=(2, 1))), (1, 4)),
        (
            (9, 13),
            40,
            (1, 2),
            (Window((4, 3), causal=(True, False)), Window((2, 3), causal=(True, False))),
            (1, (2, 3)),
        ),
        ((9, 13), 40, (1,), (0, Window((3, 4), causal=(False, True), shape="ball")), (1, 2)),
        ((9, 13), 40, (1,), (Window(5, shape="ball"), Window(4, causal=True)), (1, 3)),
    ],
)
def test_embeddings_match_windows_of_a_dense_map(
    shape: tuple[int, ...],
    n: int,
    strides: tuple[Any, ...],
    sizes: tuple[Any, ...],
    window_strides: tuple[Any, ...],
) -> None:
    stem = make_stem(len(shape), strides=strides, window_sizes=sizes, window_strides=window_strides)
    coordinates, values = random_points(shape, 3, n)
    assert len(coordinates.unique(dim=0)) < n  # cells are shared
    pyramid = stem(coordinates, values, shape, 3)
    expected = stem_by_hand(stem, coordinates, values, shape, 3)
    assert pyramid.batch_size == 3
    assert pyramid.strides == stem.strides
    extents = [
        tuple(size * step for size, step in zip(*level, strict=True))
        for level in zip(pyramid.level_shapes, stem.strides, strict=True)
    ]
    assert len(set(extents)) == 1
    assert all(extent >= size for extent, size in zip(extents[0], shape, strict=True))
    assert len(pyramid) == len(expected)
    assert (pyramid.batch.diff() >= 0).all()
    for row, value in zip(pyramid.coordinates.tolist(), pyramid.values, strict=True):
        assert_close(value, expected[tuple(row)], EXACT)


def test_offsets_within_cells_are_below_half_a_cell_and_average_to_zero() -> None:
    stem = make_stem(2, strides=(1, 2, 5))
    features: list[Tensor] = []
    stem.layers.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    cells = torch.tensor([[0, *cell] for cell in itertools.product(range(10), repeat=2)])
    stem(cells, torch.ones(100, CHANNELS, dtype=torch.float64), (10, 10), 1)
    offsets = features[0][:, -6:].unflatten(1, (2, 3))  # [n, axis, level], after the windows
    assert (offsets.abs() < 0.5).all()
    assert not offsets[..., 0].any()
    assert offsets[..., 1].unique().tolist() == [-0.25, 0.25]
    assert_close(offsets[..., 2].unique(), torch.linspace(-0.4, 0.4, 5, dtype=torch.float64), 1e-12)
    assert_close(offsets.mean(0), torch.zeros(2, 3, dtype=torch.float64), 1e-12)


def test_the_order_of_points_and_other_images_do_not_matter() -> None:
    stem = make_stem(2)
    coordinates, values = random_points((32, 24), 3, 60)
    pyramid = stem(coordinates, values, (32, 24), 3)
    order = torch.randperm(60)
    other = stem(coordinates[order], values[order], (32, 24), 3)
    assert torch.equal(other.coordinates, pyramid.coordinates)
    assert_close(other.values, pyramid.values, EXACT)
    first = coordinates[:, 0] == 0
    alone = stem(coordinates[first], values[first], (32, 24), 1)
    assert_close(alone.values, pyramid.values[pyramid.batch == 0], EXACT)


def test_gradients_reach_the_values_and_all_parameters() -> None:
    stem = make_stem(2)
    coordinates, values = random_points((16, 16), 2, 30)
    values.requires_grad_()
    out = stem(coordinates, values, (16, 16), 2).values
    (out * torch.randn_like(out)).sum().backward()
    assert values.grad is not None
    assert values.grad.any(1).all()
    assert all(p.grad is not None and p.grad.any() for p in stem.parameters())


@pytest.mark.parametrize("periodic", [(), (1,)])
def test_gradients_of_values_are_exact_and_the_same_for_any_number_of_threads(
    periodic: tuple[int, ...],
) -> None:
    stem = make_stem(2, strides=(1, 2), window_sizes=(3, Window((3, 5), shape="ball")))
    coordinates, values = random_points((16, 12), 3, 60)
    values.requires_grad_()

    def gradient(n_threads: int) -> Tensor:
        torch.set_num_threads(n_threads)
        pyramid = stem(coordinates, values, (16, 12), 3, periodic_axes=periodic)
        return torch.autograd.grad(pyramid.values.pow(3).sum(), values)[0]

    n_threads = torch.get_num_threads()
    one, two, again = (gradient(n) for n in (1, 2, 2))
    torch.set_num_threads(n_threads)
    assert torch.equal(one, two)
    assert torch.equal(two, again)
    by_hand = stem_by_hand(stem, coordinates, values, (16, 12), 3, periodic)
    expected = torch.stack([x.pow(3).sum() for x in by_hand.values()]).sum()
    assert_close(one, torch.autograd.grad(expected, values)[0], EXACT)


@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_no_points_at_all(batch_size: int) -> None:
    stem = make_stem(2)
    empty = torch.empty(0, 3, dtype=torch.int64), torch.empty(0, CHANNELS, dtype=torch.float64)
    pyramid = stem(*empty, (8, 8), batch_size)
    assert pyramid.values.shape == (0, EMBED)
    assert pyramid.batch_size == batch_size
    pyramid.values.sum().backward()
    assert all(p.grad is not None for p in stem.parameters())


def test_grids_that_strides_do_not_divide() -> None:
    stem = make_stem(2)
    coordinates, values = random_points((13, 11), 2, 30)
    pyramid = stem(coordinates, values, (13, 11), 2)
    assert pyramid.level_shapes == ((16, 16), (8, 8), (4, 4), (2, 2))
    assert not pyramid.misplaced().any()
    assert pyramid.values.isfinite().all()


@pytest.mark.parametrize("periodic", [(0,), (1,), (0, 1)])
def test_windows_pass_the_seam_of_periodic_axes(periodic: tuple[int, ...]) -> None:
    stem = make_stem(2, strides=((1, 2), (2, 4)), window_sizes=(3, 5), window_strides=(1, 2))
    coordinates, values = random_points((12, 16), 3, 40)
    pyramid = stem(coordinates, values, (12, 16), 3, periodic_axes=periodic)
    assert pyramid.periodic_axes == periodic
    expected = stem_by_hand(stem, coordinates, values, (12, 16), 3, periodic)
    for row, value in zip(pyramid.coordinates.tolist(), pyramid.values, strict=True):
        assert_close(value, expected[tuple(row)], EXACT)
    plain = stem(coordinates, values, (12, 16), 3)
    assert not torch.equal(plain.values, pyramid.values)
    with refused("spatial_shape"):
        stem(coordinates, values, (13, 17), 3, periodic_axes=periodic)


def test_the_pyramid_keeps_where_raw_points_are() -> None:
    stem = make_stem(2, strides=((2, 1), (4, 3)))
    coordinates, values = random_points((11, 13), 3, 60)
    raw: Any = {"origin": (-2, 5), "cell_size": 0.5}  # one number for all axes
    pyramid = stem(coordinates, values, (11, 13), 3, **raw, keep_point_rows=True)
    assert (pyramid.origin, pyramid.cell_size) == ((-2.0, 5.0), (0.5, 0.5))
    rows = pyramid.point_rows
    assert rows is not None
    for level, stride in enumerate(stem.strides):
        cells = pyramid.coordinates[rows[:, level]]
        assert (cells[:, -1] == level).all()
        assert torch.equal(cells[:, 0], coordinates[:, 0])
        assert torch.equal(cells[:, 1:-1], coordinates[:, 1:] // torch.tensor(stride))
    assert stem(coordinates, values, (11, 13), 3).point_rows is None


def test_arrays_and_integers_of_numpy_are_taken() -> None:
    numbers = np.array([[1, 2], [2, 4]])
    stem = make_stem(np.int64(2), strides=numbers, window_sizes=np.array([3, 3]))
    same = make_stem(2, strides=((1, 2), (2, 4)), window_sizes=(3, 3))
    same.load_state_dict(stem.state_dict())
    coordinates, values = random_points((11, 13), 3, 60)
    expected = same(coordinates, values, (11, 13), 3)
    for shape in (np.array([11, 13]), torch.Size([11, 13]), torch.tensor([11, 13])):
        arguments: Any = coordinates.numpy(), values.numpy(), shape, np.int32(3)
        pyramid = stem(*arguments)
        assert torch.equal(pyramid.values, expected.values)
        assert pyramid.level_shapes == expected.level_shapes


def test_autocast_output_is_close_and_in_full_precision() -> None:
    stem = make_stem(2).float()
    coordinates, values = random_points((16, 16), 2, 30)
    exact = stem(coordinates, values.float(), (16, 16), 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = stem(coordinates, values.float(), (16, 16), 2)
    assert out.values.dtype == torch.float32
    assert_close(out.values, exact.values, 0.2)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("in_channels", {"in_channels": 0}),
        ("embed_dim", {"embed_dim": 1.5}),
        ("position_dim", {"position_dim": 0}),
        ("strides", {"strides": ()}),
        ("strides", {"strides": (1, 0)}),
        ("window_strides", {"window_strides": (2, 4)}),
        ("window_strides", {"window_strides": (1, 0)}),
        ("window_strides", {"window_strides": ()}),
        ("window_sizes", {"window_sizes": (3,)}),
        ("window_sizes", {"window_sizes": (3, 4)}),
        ("window_sizes", {"window_sizes": (3, -1)}),
        ("window_sizes", {"window_sizes": (0, 0)}),
        ("window_sizes", {"window_sizes": (3, (3, 2))}),
        ("window_sizes", {"window_sizes": (3, (3, 3, 3))}),
        (
            "window_strides",
            {"window_sizes": (Window(2, causal=True), 3, 0), "window_strides": (1, 2, 3)},
        ),
        (
            "window_strides",
            {
                "window_sizes": (Window((3, 2), causal=(False, True)), 3, 3),
                "window_strides": (1, (3, 2), (2, 3)),
            },
        ),
    ],
)
def test_invalid_options_are_refused_by_name(argument: str, options: dict[str, Any]) -> None:
    with refused(argument):
        PointStem(**{"in_channels": CHANNELS, "embed_dim": EMBED} | options)


def test_strides_need_to_divide_each_other_along_causal_axes_alone() -> None:
    window = Window((3, 2), causal=(False, True))
    strides = (1, (2, 2), (3, 4))
    assert make_stem(2, window_sizes=(window, 3, 3), window_strides=strides)


@pytest.mark.parametrize("window", [7, Window((3, 3), dilation=(3, 1)),
                                    Window((2, 3), causal=(True, False))])  # fmt: skip
def test_windows_that_periodic_axes_cannot_have_are_refused(window: Any) -> None:
    stem = make_stem(2, strides=(1,), window_sizes=(1, window), window_strides=(1, 2))
    coordinates, values = random_points((12, 16), 2, 10)
    stem(coordinates, values, (12, 16), 2)
    with refused("window_sizes"):
        stem(coordinates, values, (12, 16), 2, periodic_axes=(0,))


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("values", {"values": torch.zeros(4, CHANNELS + 1, dtype=torch.float64)}),
        ("values", {"values": torch.zeros(4, CHANNELS, dtype=torch.int64)}),
        ("values", {"values": torch.zeros(4, CHANNELS)}),
        ("coordinates", {"coordinates": torch.zeros(4, 4, dtype=torch.int64)}),
        ("coordinates", {"coordinates": torch.zeros(3, 3, dtype=torch.int64)}),
        ("coordinates", {"coordinates": torch.zeros(4, 3)}),
        ("coordinates", {"coordinates": torch.full((4, 3), 9)}),
        ("spatial_shape", {"spatial_shape": (8, 8, 8)}),
        ("spatial_shape", {"spatial_shape": 8}),
        ("spatial_shape", {"spatial_shape": (8, 0)}),
        ("batch_size", {"batch_size": -1}),
    ],
)
def test_invalid_arguments_are_refused_by_name(argument: str, wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "coordinates": torch.zeros(4, 3, dtype=torch.int64),
        "values": torch.zeros(4, CHANNELS, dtype=torch.float64),
        "spatial_shape": (8, 8),
        "batch_size": 1,
    }
    stem = make_stem(2)
    assert isinstance(stem(**arguments), FeaturePyramid)
    with pytest.raises(ValueError, match=rf"^{argument}( \(batch\))?: expected .*, got "):
        stem(**arguments | wrong)
