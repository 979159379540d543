"""Batches of pyramids: collation for data loaders, pytrees, and files of tensors."""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._index.cell_hash import CellIndex
from ._index.copies import PointCopies
from ._plan.keyed_cells import KeyedCells
from ._pyramid.data import TENSOR_FIELDS
from ._utils.checks import refuse
from ._utils.collation import batched_parts, collate
from .backends.types import NeighborSlices, PlanTensors
from .placement import QueryPlacement
from .plan import NeighborhoodPlan
from .pyramid import FeaturePyramid
from .voxels import Voxels
from .window_shapes import AxisWindows, Window


def collate_pyramids(samples: Sequence[Any]) -> Any:
    """Makes one batch of samples that are pyramids, or tuples, lists or dicts that hold pyramids.

    It is the ``collate_fn`` of a `torch.utils.data.DataLoader`. Pyramids become one with the images
    of all, as by `FeaturePyramid.cat`. So do `Voxels`, `QueryPlacement`, `vicinal.detr.Targets`,
    `vicinal.detr.ObjectQueries` and `vicinal.detr.Predictions`, by their own ``cat``. None stays
    None. All else is left to `torch.utils.data.default_collate`, which stacks tensors.

    Args:
        samples: the samples of the batch, at least one, all of the same structure: tuples, named
            tuples, lists, mappings and dataclasses, nested or not.

    Returns:
        one sample of that structure. Mappings, lists and dataclasses are shallow copies of the
        first sample's, so that a ``defaultdict`` keeps its default.

    Raises:
        ValueError: there is no sample, structures differ, what they hold cannot be one, or offsets
            beside a pyramid are not of its images. The message names the sample and the field.

    Example:
        ```python
        import torch
        from torch.utils.data import DataLoader
        from vicinal import collate_pyramids, voxelize

        def make_sample(label: int):
            voxels = voxelize(torch.rand(50, 2), cell_size=0.1, bounds=[(0, 1), (0, 1)])
            return voxels.pyramid(torch.randn(50, 16)), label

        samples = [make_sample(label) for label in range(6)]
        loader = DataLoader(samples, batch_size=3, collate_fn=collate_pyramids)
        for pyramid, labels in loader:
            assert pyramid.batch_size == len(labels) == 3
        ```
    """
    if not isinstance(samples, Sequence) or not samples:
        refuse("samples", "at least one sample", samples)
    for index, sample in enumerate(samples):
        _check_images(f"samples[{index}]", sample)
    return collate(list(samples))


def _check_images(argument: str, sample: Any) -> None:
    """Raises ValueError where offsets in a sample are not of the images of a pyramid in it: in a
    batch, they would be those of other images.
    """
    parts = list(batched_parts(sample))
    counts = [part.batch_size for _, part in parts if isinstance(part, FeaturePyramid)]
    for field, part in parts:
        shape: tuple[int, ...] = getattr(getattr(part, "offsets", None), "shape", ())
        if counts and len(shape) == 1 and shape[0] - 1 not in counts:
            expected = f"offsets of {' or '.join(map(str, counts))} images, as of the pyramid"
            refuse(f"{argument}{field}.offsets", expected, f"offsets of {shape[0] - 1} images")


_Context = tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]  # names of tensors; other fields


def _flatten(pyramid: FeaturePyramid) -> tuple[list[Tensor], _Context]:
    fields = vars(pyramid)
    tensors = {name: fields[name] for name in TENSOR_FIELDS if fields[name] is not None}
    rest = tuple((name, value) for name, value in fields.items() if name not in tensors)
    return list(tensors.values()), (tuple(tensors), rest)


def _unflatten(leaves: Iterable[Any], context: _Context) -> FeaturePyramid:
    # Not by the constructor: leaves may be anything, such as the sizes of the tensors.
    names, rest = context
    pyramid = object.__new__(FeaturePyramid)
    vars(pyramid).update(rest, **dict(zip(names, leaves, strict=True)))
    return pyramid


def _as_tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _register_pytree() -> None:
    """Lets `torch.export` and ``tree_map`` take pyramids, whose leaves are their tensors."""
    from torch.utils import _pytree

    def flatten_with_keys(pyramid: FeaturePyramid) -> tuple[list[tuple[Any, Any]], _Context]:
        leaves, context = _flatten(pyramid)
        keys = map(_pytree.GetAttrKey, context[0])
        return list(zip(keys, leaves, strict=True)), context

    _pytree.register_pytree_node(
        FeaturePyramid,
        _flatten,
        _unflatten,
        serialized_type_name="vicinal.FeaturePyramid",
        to_dumpable_context=list,
        from_dumpable_context=_as_tuples,
        flatten_with_keys_fn=flatten_with_keys,
    )


# Without these private names all else works.
with contextlib.suppress(ImportError, AttributeError, TypeError):
    _register_pytree()

# What `torch.load(weights_only=True)` may rebuild: tuples and dataclasses of tensors and numbers.
torch.serialization.add_safe_globals(
    [
        FeaturePyramid,
        Voxels,
        QueryPlacement,
        NeighborhoodPlan,
        PointCopies,
        PlanTensors,
        NeighborSlices,
        Window,
        AxisWindows,
        KeyedCells,
        CellIndex,
    ]
)
