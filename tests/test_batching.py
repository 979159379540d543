"""Batches of pyramids: concatenation, collation, images, devices, pytrees and files."""

import copy
import io
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
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
from vicinal.detr import ObjectQueries, Predictions, Targets

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


# ---------------------------------------------------------- samples of several kinds


def make_targets(n: int) -> Targets:
    boxes = torch.rand(n, 4) + 1
    return Targets(boxes, torch.arange(n), torch.tensor([0, n]))


def make_queries(n: int, grouped: bool = False) -> ObjectQueries:
    groups = torch.arange(n) if grouped else None
    offsets = torch.tensor([0, n])
    return ObjectQueries(
        torch.randn(n, 8), torch.rand(n, 4), torch.zeros(n).long(), offsets, groups
    )


def make_placement(n: int, levels: bool = False) -> QueryPlacement:
    level = torch.ones(n, dtype=torch.int64) if levels else None
    return QueryPlacement(torch.rand(n, 2), torch.tensor([0, n]), level)


RAGGED: dict[str, Callable[[int], Any]] = {
    "targets": make_targets,
    "queries": make_queries,
    "grouped queries": lambda n: make_queries(n, grouped=True),
    "placement": make_placement,
    "placement with levels": lambda n: make_placement(n, levels=True),
    "predictions": lambda n: Predictions(
        torch.randn(n, 3), torch.rand(n, 4), torch.tensor([0, n], dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("kind", RAGGED)
def test_ragged_batches_are_concatenated(kind: str) -> None:
    parts = [RAGGED[kind](n) for n in (2, 0, 3)]
    pyramids = [make_pyramid(20, seed) for seed in range(3)]
    pyramid, (joined, names) = collate_pyramids(
        [
            (pyramid, (part, f"image {index}"))
            for index, (pyramid, part) in enumerate(zip(pyramids, parts, strict=True))
        ]
    )
    assert pyramid.batch_size == 3
    assert list(names) == ["image 0", "image 1", "image 2"]
    assert type(joined) is type(parts[0])
    assert joined.offsets.tolist() == [0, 2, 2, 5]
    for field in set(joined._fields) - {"offsets"}:
        values = [getattr(part, field) for part in parts]
        expected = None if values[0] is None else torch.cat(values)
        assert_same(getattr(joined, field), expected)
    assert_same(type(joined).cat([joined, parts[0]]).offsets.tolist(), [0, 2, 2, 5, 7])


def test_targets_alone_are_samples() -> None:
    joined = collate_pyramids([make_targets(1), make_targets(2)])
    assert joined.offsets.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (make_placement(2, levels=True), make_placement(2), r"\[1\]\.levels"),
        (make_placement(2), make_placement(2, levels=True), r"\[1\]\.levels"),
        (make_queries(2), make_queries(2, grouped=True), r"\[1\]\.groups"),
        (make_targets(2), make_targets(2)._replace(offsets=torch.tensor([0, 3])), r"\[1\]\.offs"),
        (make_targets(2)._replace(offsets=torch.tensor([1, 2])), make_targets(2), r"\[0\]\.offs"),
        (make_targets(2), make_targets(2)._replace(boxes=torch.ones(2, 6)), r"\[1\]\.boxes"),
        (make_targets(2), make_targets(2)._replace(labels=torch.ones(3).long()), r"\[1\]\.lab"),
        (make_targets(2), make_targets(2)._replace(boxes=torch.ones(2, 4).double()), r"\[1\]\.box"),
        (make_targets(2), make_placement(2), r"\[1\]"),
        (make_targets(2), None, r"\[1\]"),
        (None, make_targets(2), r"\[1\]"),
    ],
)
def test_ragged_batches_that_differ_are_refused(first: Any, second: Any, named: str) -> None:
    samples = [{"map": make_pyramid(), "objects": part} for part in (first, second)]
    with pytest.raises(ValueError, match=named) as caught:
        collate_pyramids(samples)
    assert "objects" in str(caught.value)


@pytest.mark.parametrize("n_images", [0, 1, 3])
def test_offsets_of_other_images_than_the_pyramid_are_refused(n_images: int) -> None:
    offsets = torch.zeros(n_images + 1, dtype=torch.int64)
    wrong = make_targets(0)._replace(offsets=offsets)
    samples = [(make_pyramid(9 * n, batch_size=n), {"objects": wrong}) for n in (n_images, 2)]
    with pytest.raises(ValueError, match=r"samples\[1\].*objects.*offsets"):
        collate_pyramids(samples)
    several = [(make_pyramid(), make_pyramid(batch_size=5), make_targets(2)) for _ in range(2)]
    assert [part.batch_size for part in collate_pyramids(several)[:2]] == [2, 10]


def test_fields_that_must_be_there_are_named() -> None:
    nothing: Any = None
    with pytest.raises(ValueError, match=r"parts\[1\]\.boxes"):
        Targets.cat([make_targets(1), make_targets(1)._replace(boxes=nothing)])


@pytest.mark.parametrize("parts", [[], None, make_targets(1)])
def test_no_ragged_batches_are_refused(parts: Any) -> None:
    with pytest.raises(ValueError, match="parts"):
        Targets.cat(parts)


@dataclass(frozen=True)
class Scene:
    pyramid: Any
    label: Any
    mask: Tensor | None = None


def test_containers_stay_what_they_are() -> None:
    pyramids = [make_pyramid(20, seed) for seed in range(2)]
    expected = FeaturePyramid.cat(pyramids)

    def collated(make: Callable[[FeaturePyramid], Any]) -> Any:
        return collate_pyramids([make(pyramid) for pyramid in pyramids])

    ordered = collated(lambda pyramid: OrderedDict(map=pyramid, label=1))
    assert type(ordered) is OrderedDict
    assert list(ordered) == ["map", "label"]
    assert_same(ordered["map"], expected)
    default = collated(lambda pyramid: defaultdict(list, map=pyramid))
    assert default["missing"] == []
    assert_same(default["map"], expected)
    frozen = collated(lambda pyramid: MappingProxyType({"map": pyramid}))
    assert type(frozen) is MappingProxyType
    scene = collated(lambda pyramid: Scene(pyramid, 3))
    assert type(scene) is Scene
    assert scene.label.tolist() == [3, 3]
    assert scene.mask is None
    assert_same(scene.pyramid, expected)
    nested = collated(lambda pyramid: [{"scene": Scene(pyramid, 3)}, (None, 1.5)])
    assert type(nested) is list
    assert_same(nested[0]["scene"].pyramid, expected)
    assert nested[1][0] is None
    assert nested[1][1].tolist() == [1.5, 1.5]


def test_a_batch_leaves_its_samples_as_they_were() -> None:
    samples: list[Any] = [{"map": make_pyramid(20, seed), "parts": [None, 1]} for seed in (0, 1)]
    collate_pyramids(samples)
    for seed, sample in enumerate(samples):
        assert_same(sample["map"], make_pyramid(20, seed))
        assert sample["parts"] == [None, 1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: {"scene": Scene(p, 1), "more": torch.ones(2)}, r"samples\[2\].*more"),
        (lambda p: {"scene": Scene(p, 1), "more": None}, r"samples\[2\].*more"),
        (lambda p: {"scene": Scene(p, 1, torch.ones(1)), "more": torch.ones(3)}, r"\[2\].*mask"),
        (lambda p: {"scene": Scene(None, 1), "more": torch.ones(3)}, r"pyramid.*\[2\]"),
        (lambda p: {"scene": (p, 1), "more": torch.ones(3)}, r"samples\[2\].*scene"),
        (lambda p: {"scene": Scene(p, 1)}, r"samples\[2\]"),
    ],
)
def test_messages_name_sample_and_field(change: Callable[[Any], Any], named: str) -> None:
    samples = [{"scene": Scene(make_pyramid(), 1), "more": torch.ones(3)} for _ in range(4)]
    samples[2] = change(make_pyramid())
    with pytest.raises(ValueError, match=named):
        collate_pyramids(samples)


def test_samples_that_no_collation_takes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"samples\[0\]\[1\]"):
        collate_pyramids([(make_pyramid(), object()), (make_pyramid(), object())])


# ------------------------------------------------------------------- raw points, iteration


def test_images_of_raw_points_are_kept_where_some_parts_do_not_know_them() -> None:
    known, other = make_pyramid(40, 0), make_pyramid(40, 1)
    unknown = replace(other, point_batch=None)
    assert other.point_rows is not None
    inside = other.point_rows[:, 0] >= 0
    assert not inside.all()
    for parts in ([known, unknown], [unknown, known]):
        batch = FeaturePyramid.cat(parts)
        index = parts.index(known)
        assert torch.equal(batch[index].values_of_points(), known.values_of_points())
        found = batch[1 - index].values_of_points()
        assert torch.equal(found, other.values_of_points()[inside])
        assert torch.equal(
            batch.values_of_points(), torch.cat([part.values_of_points() for part in parts])
        )
        assert_same(replace(batch), batch)  # its contents are valid
    assert FeaturePyramid.cat([unknown, unknown]).point_batch is None


def test_iteration_is_by_image() -> None:
    batch = FeaturePyramid.cat([make_pyramid(25, seed) for seed in range(3)])
    assert len(list(batch)) == 3
    assert len(batch) != 3
    for image, index in zip(reversed(batch), (2, 1, 0), strict=True):
        assert_same(image, batch[index])


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


def test_plans_are_not_joined() -> None:
    """They are made of a batch."""
    cells = torch.tensor([[0, 1, 1, 0]])
    pyramid = FeaturePyramid(torch.ones(1, 2), cells, ((4, 4),), 1)
    plan = plan_neighborhoods(pyramid.positions(), pyramid.batch_offsets(), pyramid, [3])
    for sample in (plan, (pyramid, plan), {"plan": plan}):
        with pytest.raises(ValueError, match=r"samples\[0\].*: expected .*, got .*Plan"):
            collate_pyramids([sample, sample])
