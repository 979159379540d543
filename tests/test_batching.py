"""Batches of pyramids: concatenation, collation, images, devices, pytrees and files."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from problems import sparse_coo
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, Dataset

from vicinal import (
    FeaturePyramid,
    NeighborhoodPlan,
    QueryPlacement,
    SparseDeformableAttention,
    SparseNeighborhoodAttentionBlock,
    collate_pyramids,
    neighborhood_attention,
    plan_neighborhoods,
    voxelize,
)

BOUNDS = [(0, 8), (0, 6)]


def make_pyramid(
    n: int = 30, seed: int = 0, batch_size: int = 1, bounds: Any = BOUNDS, **changes: Any
) -> FeaturePyramid:
    """A pyramid of raw points, some of them outside."""
    generator = torch.Generator().manual_seed(seed)
    points = 9 * torch.rand(n, 2, generator=generator) - 0.5
    batch = torch.randint(0, max(batch_size, 1), (n,), generator=generator)
    voxels = voxelize(points, batch, cell_size=0.5, bounds=bounds, batch_size=batch_size)
    features = torch.randn(n, 8, generator=generator)
    return voxels.pyramid(features, **{"strides": (1, 2), **changes})


def assert_same(first: Any, second: Any) -> None:
    """Equal types, numbers and bits, through tuples, dicts and dataclasses."""
    assert type(first) is type(second)
    if isinstance(first, FeaturePyramid):
        for field in fields(first):
            if field.name != "_":
                assert_same(getattr(first, field.name), getattr(second, field.name))
    elif isinstance(first, Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, tuple | list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


# ------------------------------------------------------------------- concatenation, images


def test_images_of_a_batch_are_those_that_it_was_made_of() -> None:
    parts = [make_pyramid(20 + 5 * seed, seed) for seed in range(4)]
    parts[1] = make_pyramid(0)
    batch = FeaturePyramid.cat(parts)
    assert batch.batch_size == 4
    assert len(batch) == sum(map(len, parts))
    for index, part in enumerate(parts):
        assert_same(batch[index], part)
        assert_same(batch[index - 4], part)
    for image, part in zip(batch, parts, strict=True):
        assert_same(image, part)
    whole = torch.cat([part.values_of_points() for part in parts])
    assert torch.equal(batch.values_of_points(), whole)


def test_pyramids_of_several_images() -> None:
    parts = [make_pyramid(40, seed, batch_size=seed) for seed in (1, 3, 2)]
    batch = FeaturePyramid.cat(parts)
    assert batch.batch_size == 6
    assert_same(batch[1:4], parts[1])
    assert_same(batch[:], batch)
    assert batch[4:4].batch_size == 0
    assert_same(batch[np.int64(4) : 6], parts[2])


def test_slices_backwards_and_with_steps() -> None:
    batch = FeaturePyramid.cat([make_pyramid(25, seed) for seed in range(5)])
    for images in (slice(None, None, -1), slice(1, 5, 2), slice(-1, -4, -1)):
        chosen, part = range(5)[images], batch[images]
        assert part.batch_size == len(chosen)
        assert part.batch.tolist() == sorted(part.batch.tolist())
        for image, index in zip(part, chosen, strict=True):
            assert_same(image, batch[index])


def test_images_of_unsorted_points() -> None:
    batch = FeaturePyramid.cat([make_pyramid(25, seed) for seed in range(3)])
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    old_rows = batch.point_rows
    assert old_rows is not None
    shuffled = FeaturePyramid(
        batch.values[order],
        batch.coordinates[order],
        batch.level_shapes,
        3,
        point_rows=torch.where(old_rows < 0, -1, torch.argsort(order)[old_rows]),
        point_batch=batch.point_batch,
    )
    for index in range(3):
        image = shuffled[index]
        rows = order[batch.batch[order] == index]
        assert torch.equal(image.values, batch.values[rows])
        assert torch.equal(image.values_of_points(), batch[index].values_of_points())


def test_raw_points_without_an_image_are_left_out() -> None:
    whole = make_pyramid(40, batch_size=2)
    known = FeaturePyramid(
        whole.values, whole.coordinates, whole.level_shapes, 2, point_rows=whole.point_rows
    )
    assert whole.point_rows is not None
    assert whole.point_batch is not None
    inside = whole.point_rows[:, 0] >= 0
    for image in (0, 1):
        expected = whole.values_of_points()[inside & (whole.point_batch == image)]
        assert torch.equal(known[image].values_of_points(), expected)
    assert not inside.all()


def test_the_larger_extent_counts_and_positions_stay() -> None:
    small = make_pyramid(bounds=[(0, 8), (0, 6)], strides=[(1, 1), (2, 3)])
    large = make_pyramid(bounds=[(0, 3), (0, 11)], strides=[(1, 1), (2, 3)])
    both = FeaturePyramid.cat([small, large])
    assert both.level_shapes == ((16, 24), (8, 8))
    for index, part in enumerate((small, large)):
        assert torch.equal(both[index].positions(), part.positions())
        assert torch.equal(both[index].coordinates, part.coordinates)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: make_pyramid(strides=(1, 4)), "strides"),
        (lambda: make_pyramid(strides=(1, 2, 4)), "levels"),
        (lambda: make_pyramid(bounds=[(1, 8), (0, 6)]), "origin"),
        (lambda: make_pyramid().to(torch.float64), "dtype"),
        (lambda: make_pyramid().to("meta"), "device"),
        (lambda: make_pyramid().with_values(torch.ones(len(make_pyramid()), 3)), "embed_dim"),
        (lambda: FeaturePyramid(*stored(make_pyramid()), strides=make_pyramid().strides), "origin"),
        (lambda: "pyramid", "FeaturePyramid"),
    ],
)
def test_pyramids_that_differ_are_refused(change: Callable[[], Any], named: str) -> None:
    with pytest.raises(ValueError, match=r"pyramids\[1\].*" + named):
        FeaturePyramid.cat([make_pyramid(), change()])


def stored(pyramid: FeaturePyramid) -> tuple[Any, ...]:
    return pyramid.values, pyramid.coordinates, pyramid.level_shapes, pyramid.batch_size


def test_shapes_that_differ_without_strides_are_refused() -> None:
    values, coordinates = torch.ones(1, 2), torch.tensor([[0, 1, 1, 0]])
    first = FeaturePyramid(values, coordinates, ((8, 8), (4, 4)), 1)
    second = FeaturePyramid(values, coordinates, ((9, 8), (4, 4)), 1)
    assert FeaturePyramid.cat([first, first]).batch_size == 2
    with pytest.raises(ValueError, match=r"pyramids\[1\]"):
        FeaturePyramid.cat([first, second])


def test_periods_that_differ_are_refused() -> None:
    points, values = torch.tensor([[0, 1, 1]]), torch.ones(1, 2)

    def periodic(shape: tuple[int, int]) -> FeaturePyramid:
        return FeaturePyramid.from_points(
            points, values, shape, 1, strides=(1, 2), periodic_axes=(0,)
        )

    assert FeaturePyramid.cat([periodic((8, 4)), periodic((8, 6))]).level_shapes[0] == (8, 6)
    with pytest.raises(ValueError, match="periodic"):
        FeaturePyramid.cat([periodic((8, 4)), periodic((16, 4))])


@pytest.mark.parametrize("pyramids", [[], None, make_pyramid()])
def test_no_pyramids_are_refused(pyramids: Any) -> None:
    with pytest.raises(ValueError, match="pyramids"):
        FeaturePyramid.cat(pyramids)


@pytest.mark.parametrize("images", [2, -3, True, 0.0, "first", None])
def test_images_that_do_not_exist_are_refused(images: Any) -> None:
    with pytest.raises(ValueError, match="images"):
        make_pyramid(batch_size=2)[images]


def test_gradients_flow_through_batches_and_images() -> None:
    parts = [make_pyramid(20, seed).to(torch.float64) for seed in (0, 1)]
    values = [part.values.clone().requires_grad_() for part in parts]

    def second_image(*values: Tensor) -> Tensor:
        pairs = zip(parts, values, strict=True)
        return FeaturePyramid.cat([part.with_values(v) for part, v in pairs])[1].values

    assert torch.autograd.gradcheck(second_image, values)


def test_bad_contents_that_are_not_checked_belong_to_no_image() -> None:
    pyramid = make_pyramid(batch_size=2)
    assert pyramid.point_rows is not None
    assert pyramid.point_batch is not None
    bad_images, bad_rows, bad_batch = (
        pyramid.coordinates.clone(),
        pyramid.point_rows.clone(),
        pyramid.point_batch.clone(),
    )
    bad_images[0, 0], bad_rows[0], bad_batch[1] = 9, 10_000, -4
    contents: dict[str, Any] = {"point_rows": bad_rows, "point_batch": bad_batch}
    broken = FeaturePyramid(
        pyramid.values, bad_images, pyramid.level_shapes, 2, check_contents=False, **contents
    )
    assert sum(map(len, broken)) == len(pyramid) - 1
    assert broken.values_of_points()[0].eq(0).all()
    assert sum(len(image.values_of_points()) for image in broken) == 29
    for name, value in contents.items():
        stale = {"point_rows": pyramid.point_rows, name: value}
        with pytest.raises(ValueError, match=name):
            FeaturePyramid(*stored(pyramid), **stale)


# ------------------------------------------------------------------------- data loaders


class Samples(Dataset[Any]):
    """Samples that hold a pyramid, in each of the forms that data sets use."""

    def __init__(self, form: str) -> None:
        self.form = form

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        pyramid, label = make_pyramid(20, index), torch.tensor([index])
        forms = {
            "pyramid": pyramid,
            "tuple": (pyramid, label),
            "dict": {"map": pyramid, "target": {"label": label, "name": f"image {index}"}},
            "named": Sample(pyramid, index),
        }
        return forms[self.form]


class Sample(NamedTuple):
    pyramid: FeaturePyramid
    label: int


@pytest.mark.parametrize("n_workers", [0, 2])
def test_loaders_of_pyramids(n_workers: int) -> None:
    loader = DataLoader(
        Samples("tuple"), batch_size=3, collate_fn=collate_pyramids, num_workers=n_workers
    )
    batches = list(loader)
    assert len(batches) == 2
    for first, (pyramid, labels) in zip((0, 3), batches, strict=True):
        parts = [make_pyramid(20, first + index) for index in range(3)]
        assert_same(pyramid, FeaturePyramid.cat(parts))
        assert labels.tolist() == [[first], [first + 1], [first + 2]]


def test_forms_of_samples() -> None:
    expected = FeaturePyramid.cat([make_pyramid(20, index) for index in range(2)])

    def collated(form: str) -> Any:
        return collate_pyramids([Samples(form)[index] for index in range(2)])

    assert_same(collated("pyramid"), expected)
    batch = collated("dict")
    assert_same(batch["map"], expected)
    assert batch["target"]["label"].tolist() == [[0], [1]]
    assert batch["target"]["name"] == ["image 0", "image 1"]
    named = collated("named")
    assert isinstance(named, Sample)
    assert_same(named.pyramid, expected)
    assert named.label.tolist() == [0, 1]  # type: ignore[attr-defined]
    assert collate_pyramids([torch.ones(2), torch.ones(2)]).shape == (2, 2)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ((make_pyramid(), 1, 2), "samples"),
        ({"map": make_pyramid()}, "samples"),
        ((make_pyramid(strides=(1, 4)), 1), "pyramids"),
        ((torch.ones(2), 1), "pyramids"),
    ],
)
def test_samples_that_differ_are_refused(other: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named + r"\[1\]"):
        collate_pyramids([(make_pyramid(), 0), other])
    nothing: Any
    for nothing in ([], None):
        with pytest.raises(ValueError, match="samples"):
            collate_pyramids(nothing)


# ---------------------------------------------------------------------- devices and dtypes


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        (("cpu",), torch.float32),
        ((torch.device("cpu"),), torch.float32),
        ((torch.float64,), torch.float64),
        (("cpu", torch.bfloat16), torch.bfloat16),
        ((None, torch.float16, True), torch.float16),
        ((), torch.float32),
    ],
)
def test_dtypes_are_those_of_values_alone(arguments: Any, dtype: torch.dtype) -> None:
    pyramid = make_pyramid()
    moved = pyramid.to(*arguments)
    assert torch.equal(moved.values, pyramid.values.to(dtype))
    assert moved.values.dtype == dtype
    assert_same(moved.with_values(pyramid.values), pyramid)


def test_integer_values_keep_their_dtype() -> None:
    pyramid = make_pyramid().with_values(torch.ones(len(make_pyramid()), 2, dtype=torch.int32))
    assert pyramid.to(dtype=torch.float64).values.dtype == torch.int32


def test_all_tensors_move() -> None:
    moved = make_pyramid().to("meta", non_blocking=True)
    leaves = tree_leaves(moved)
    assert len(leaves) == 4
    assert all(leaf.is_meta for leaf in leaves)


@pytest.mark.parametrize("wrong", [("nowhere",), (torch.int64,), ("cpu", "float32"), ([],)])
def test_what_is_no_device_or_dtype_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"device|dtype"):
        make_pyramid().to(*wrong)


def test_all_tensors_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    pyramid = make_pyramid()
    assert_same(pyramid.pin_memory(), pyramid)
    assert len(pinned) == 4


# ---------------------------------------------------------------------------- pytrees


def test_pyramids_are_trees_of_their_tensors() -> None:
    pyramid = make_pyramid()
    assert [leaf.shape for leaf in tree_leaves({"map": pyramid})] == [
        pyramid.values.shape,
        pyramid.coordinates.shape,
        (30, 2),
        (30,),
    ]
    assert_same(tree_map(torch.clone, pyramid), pyramid)
    without_rows = FeaturePyramid(*stored(pyramid))
    assert len(tree_leaves(without_rows)) == 2
    assert_same(tree_map(torch.clone, without_rows), without_rows)
    shapes = tree_map(lambda leaf: tuple(leaf.shape), pyramid)
    assert shapes.values == pyramid.values.shape


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = SparseNeighborhoodAttentionBlock(8, 2, n_levels=2, neighborhood_sizes=[3, 5])

    def forward(self, pyramid: FeaturePyramid, offsets: Tensor) -> FeaturePyramid:
        out = self.block(
            pyramid.values,
            pyramid.positions(),
            offsets,
            pyramid,
            query_level_indices=pyramid.levels,
        )
        return pyramid.with_values(out)


def test_export_takes_and_returns_pyramids() -> None:
    layer, pyramid = Layer(), make_pyramid()
    arguments = pyramid, pyramid.batch_offsets()
    program = torch.export.export(layer, arguments)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, torch.export.load(file)):
        out = exported.module()(*arguments)
        torch.testing.assert_close(out.values, layer(*arguments).values)
        assert_same(out.with_values(pyramid.values), pyramid)


# ------------------------------------------------------------------------------- files


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def periodic_pyramid() -> FeaturePyramid:
    points = torch.tensor([[0, 0, 1], [0, 7, 2], [1, 3, 3], [1, 0, 0]])
    return FeaturePyramid.from_points(
        points, torch.randn(4, 8), (8, 4), 2, strides=(1, 2), periodic_axes=(0,)
    )


COPIES: dict[str, Callable[[Any], Any]] = {
    "file": through_a_file,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_pyramids(how: str) -> None:
    for pyramid in (make_pyramid(batch_size=3), periodic_pyramid()):
        assert_same(COPIES[how](pyramid), pyramid)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [make_pyramid, periodic_pyramid])
def test_copies_of_plans(how: str, make: Callable[[], FeaturePyramid]) -> None:
    pyramid = make()
    placement = QueryPlacement.of_points(pyramid)
    plan = plan_neighborhoods(placement.positions, placement.offsets, pyramid, [3, 3])
    q = torch.randn(len(pyramid), 2, 4, dtype=torch.float64)
    keys = plan.append_copies(torch.randn(len(pyramid), 2, 4, dtype=torch.float64))

    def attend(plan: NeighborhoodPlan) -> list[Tensor]:
        k = keys.clone().requires_grad_()
        out = neighborhood_attention(q, k, k, plan)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), k)]

    expected = attend(plan)
    copied = COPIES[how](plan)
    assert repr(copied) == repr(plan)
    assert torch.equal(copied.pairs(), plan.pairs())
    for values, wanted in zip(attend(copied), expected, strict=True):
        assert torch.equal(values, wanted)


def test_a_loaded_plan_serves_its_own_points_alone() -> None:
    pyramid = make_pyramid()
    placement = QueryPlacement.of_points(pyramid)
    plan = plan_neighborhoods(placement.positions, placement.offsets, pyramid, [3, 3])
    copied = through_a_file(plan)
    block = SparseNeighborhoodAttentionBlock(8, 2, n_levels=2, neighborhood_sizes=[3, 3])
    inputs = pyramid.values, placement.positions, placement.offsets, pyramid
    out = block(*inputs, query_level_indices=placement.levels, plan=copied)
    same = block(*inputs, query_level_indices=placement.levels, plan=plan)
    assert torch.equal(out, same)
    with pytest.raises(ValueError, match="plan"):
        block(*inputs[:3], make_pyramid(45), query_level_indices=placement.levels, plan=copied)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [make_pyramid, periodic_pyramid])
def test_copies_of_cell_indices(how: str, make: Callable[[], FeaturePyramid]) -> None:
    pyramid = make()
    attention = SparseDeformableAttention(8, 2, n_levels=2)
    inputs = pyramid.values, pyramid.positions(), pyramid.batch_offsets(), pyramid
    index = attention.make_plan(*inputs[1:])
    copied = COPIES[how](index)
    assert torch.equal(attention(*inputs, plan=copied), attention(*inputs, plan=index))


def test_voxels_and_placements_are_saved(tmp_path: Path) -> None:
    voxels = voxelize(torch.rand(9, 2), cell_size=0.1)
    placement = QueryPlacement.of_points(make_pyramid())
    torch.save({"voxels": voxels, "placement": placement}, tmp_path / "scene.pt")
    loaded = torch.load(tmp_path / "scene.pt", weights_only=True)
    assert_same(loaded["voxels"], voxels)
    assert_same(loaded["placement"], placement)


def test_a_plan_goes_to_the_device_that_it_is_loaded_to() -> None:
    pyramid = make_pyramid()
    plan = plan_neighborhoods(pyramid.positions(), pyramid.batch_offsets(), pyramid, [3, 3])
    file = io.BytesIO()
    torch.save(plan, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True, map_location="meta")
    assert loaded.device.type == "meta"
    assert loaded.n_points == len(pyramid)


def test_pyramids_of_coo_maps_are_saved() -> None:
    coo = sparse_coo(torch.tensor([[0], [1], [2], [0]]), torch.ones(1, 3), (1, 4, 4, 1, 3))
    pyramid = FeaturePyramid.from_coo(coo, [(4, 4)])
    assert_same(through_a_file(pyramid), pyramid)
