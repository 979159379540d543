"""Schemas, fake kernels and gradients of the ops; back ends register kernels for a device.

So `torch.compile`, `torch.export`, saved-tensor hooks and `opcheck` work with any kernel.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..window_shapes import Windows, count_cells
from .op_checks import checked
from .transforms import (
    Rule,
    call,
    once,
    refuse_double_backward,
    refuse_forward_mode,
    transforms_active,
)
from .types import LIST_BLOCK, NeighborSlices, QuerySlices, slices_per_level, window_tables

_ENTRIES_PER_ROW = 48  # in lists, where tiles are many
_LEAST_BLOCKS = 2**14  # in lists, where tiles are few: 4 MiB

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? query_mask, Tensor? seed, Tensor[]? background, "
    "Tensor? bias, Tensor[] plan, int[] slices, float scale, float dropout_p"
)
_SCHEMAS = {
    "neighborhood_attention": f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    "neighborhood_attention_backward": (
        f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, {_ARGUMENTS}, "
        "bool needs_queries, bool needs_points) -> (Tensor, Tensor, Tensor, Tensor[], Tensor)"
    ),
    "rotate": "(Tensor x, Tensor coordinates, Tensor frequencies) -> Tensor",
    "rotate_backward": (
        "(Tensor grad_out, Tensor out, Tensor coordinates, Tensor frequencies, "
        "bool needs_coordinates) -> (Tensor, Tensor, Tensor)"
    ),
    "find_slices": (
        "(Tensor sorted_keys, Tensor query_keys, Tensor traversal, Tensor level, Tensor first, "
        "Tensor width) -> (Tensor, Tensor)"
    ),
    "find_query_slices": (
        "(Tensor positions, Tensor offsets, Tensor coordinates, Tensor copies, Tensor shifts, "
        "Tensor levels, Tensor slots, SymInt[] numbers, ScalarType key_dtype, "
        "ScalarType coordinate_dtype) -> Tensor[]"
    ),
    "find_point_slices": (
        "(Tensor query_keys, Tensor point_keys, Tensor groups, Tensor cells, Tensor slots, "
        "SymInt[] numbers, int n_levels) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "find_runs": (
        "(Tensor traversal, Tensor starts, Tensor stops, SymInt n_columns, int[] slices, int rows) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "find_lists": (
        "(Tensor[] tiles, Tensor[] windows, int[] slices, int n_cells, int rows, "
        "bool rows_are_queries) -> (Tensor, Tensor, Tensor)"
    ),
}

_EVERYWHERE = (
    "neighborhood_attention",
    "neighborhood_attention_backward",
    "rotate",
    "rotate_backward",
)


class DifferentiableOp:
    """An op that is differentiable once, also under the transforms of `torch.func`."""

    def __init__(
        self, namespace: str, name: str, setup: Callable[..., None], backward: Callable[..., Any]
    ) -> None:
        """``backward`` gets the op that computes the gradients, the context, which arguments need
        a gradient, and the gradients of the results.
        """
        self._op = getattr(getattr(torch.ops, namespace), name)
        op_backward = getattr(getattr(torch.ops, namespace), f"{name}_backward")
        self._rule = Rule(self._op, setup, functools.partial(backward, once(op_backward)))

        def register(ctx: Any, *grads: Tensor) -> Any:
            return backward(op_backward, ctx, ctx.needs_input_grad, *grads)

        full_name = f"{namespace}::{name}"
        register_gradient(full_name, register, setup)
        register_gradient(f"{full_name}_backward", refuse_double_backward)

    def __call__(self, *arguments: Any) -> Any:
        if transforms_active():
            return call(self._rule, *arguments)
        return self._op(*arguments)


class Ops:
    """The ops of one back end, in a namespace of its own: two back ends may share a device."""

    def __init__(self, namespace: str, *others: str) -> None:
        """``others`` names ops beyond those that every back end has."""
        self._ops = getattr(torch.ops, namespace)
        self.namespace = namespace
        self.names = (*_EVERYWHERE, *others)
        for name in self.names:
            if not hasattr(self._ops, name):  # a compiled kernel defines its own
                torch.library.define(f"{namespace}::{name}", _SCHEMAS[name])
            torch.library.register_fake(f"{namespace}::{name}", on_one_device(_FAKES[name]))
        self._attend = DifferentiableOp(
            namespace, "neighborhood_attention", _setup_attention, _backward_attention
        )
        self._rotate = DifferentiableOp(namespace, "rotate", _setup_rotate, _backward_rotate)

    def register(self, device: str, kernels: dict[str, Callable[..., Any]]) -> None:
        """Registers ``kernels``, by the names of the ops, for a device, with checks of shapes."""
        for name, kernel in kernels.items():
            torch.library.impl(f"{self.namespace}::{name}", device, checked(name, kernel))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Sequence[Tensor], slices: Sequence[int],
        background: Sequence[Tensor], bias: Tensor | None, query_mask: Tensor | None,
        seed: Tensor | None, scale: float, dropout_p: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `reference.attend`; ``plan`` holds the tensors of it that the kernel needs, and
        ``slices`` the number of rows of each level's windows.
        """
        refuse_tangents(q, k, v, *background, bias)
        result: tuple[Tensor, Tensor] = self._attend(
            q, k, v, query_mask, seed, list(background), bias, list(plan), list(slices), scale,
            dropout_p,
        )  # fmt: skip
        return result

    def rotate(self, x: Tensor, coordinates: Tensor, frequencies: Tensor) -> Tensor:
        """See `reference.rotate`."""
        return self.rotate_unconverted(
            x, coordinates.to(torch.float64), frequencies.to(torch.float64)
        )

    def rotate_unconverted(self, x: Tensor, coordinates: Tensor, frequencies: Tensor) -> Tensor:
        """`rotate` for a kernel that converts coordinates and frequencies to float64 itself."""
        refuse_tangents(x, coordinates, frequencies)
        table = frequencies.expand(-1, x.shape[1], -1).contiguous()
        rotated: Tensor = self._rotate(x, coordinates.contiguous(), table)
        return rotated

    def find_slices(
        self, sorted_keys: Tensor, query_keys: Tensor, traversal: Tensor, level: Tensor,
        first: Tensor, width: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `reference.find_slices`."""
        slices: tuple[Tensor, Tensor] = self._ops.find_slices(
            sorted_keys, query_keys, traversal, level, first, width
        )
        return slices

    def find_query_slices(
        self, positions: Tensor, offsets: Tensor, coordinates: Tensor, copies: Tensor,
        shifts: Tensor, levels: Tensor, slots: Tensor, numbers: Sequence[int],
        key_dtype: torch.dtype, coordinate_dtype: torch.dtype,
    ) -> QuerySlices:  # fmt: skip
        """Finds images, cells, keys and slices of queries, as `plan` does in plain torch.

        Args:
            positions: floating ``[N, P]``, wrapped along periodic axes.
            offsets: integer, at least one number.
            coordinates: int64 ``[nnz, P + 2]``.
            copies, shifts: int64 ``[C]`` and ``[C, P]``, see `_index.copies.PointCopies`.
            levels, slots, numbers: see `_index.kernel_tables.KernelTables`.
            key_dtype: int32 or int64.
            coordinate_dtype: of the coordinates of keys, float32 or float64.
        """
        found = self._ops.find_query_slices(
            positions, offsets.contiguous(), coordinates, copies, shifts, levels, slots,
            list(numbers), key_dtype, coordinate_dtype,
        )  # fmt: skip
        return QuerySlices(*found)

    def find_point_slices(
        self, query_keys: Tensor, point_keys: Tensor, groups: Tensor, cells: Tensor,
        slots: Tensor, numbers: Sequence[int], n_levels: int,
    ) -> NeighborSlices:  # fmt: skip
        """Finds the slices of points, as `plan` does in plain torch.

        Args:
            query_keys, point_keys: ``[L, N]`` and ``[nnz]``, both of one dtype.
            groups, cells: int32 ``[1, nnz]`` and ``[1, P, nnz]``, of the points.
            slots, numbers: see `_index.kernel_tables.KernelTables`.
            n_levels: L.
        """
        found = self._ops.find_point_slices(
            query_keys, point_keys, groups, cells, slots, list(numbers), n_levels
        )
        return NeighborSlices(*found)

    def find_runs(
        self, traversal: Tensor, starts: Tensor, stops: Tensor, n_columns: int,
        slices: Sequence[int], rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `reference.find_runs`."""
        runs: tuple[Tensor, Tensor, Tensor] = self._ops.find_runs(
            traversal, starts, stops, n_columns, list(slices), rows
        )
        return runs

    def find_lists(
        self, tiles: Sequence[Tensor], windows: Windows, rows: int, rows_are_queries: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ``lists``, ``items`` and ``members`` of `Tiles` of ``rows`` rows.

        ``tiles`` are the fields before these, ``windows`` those of all levels. Where rows are not
        queries, they are points.
        """
        tables = window_tables(windows, tiles[0].device)
        n_cells = sum(map(count_cells, windows))
        lists: tuple[Tensor, Tensor, Tensor] = self._ops.find_lists(
            list(tiles), list(tables), slices_per_level(windows), n_cells, rows, rows_are_queries
        )
        return lists


def on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake`` with a check of devices. Torch calls fakes for a mix of meta and other tensors too,
    and would return uninitialized memory.
    """

    @functools.wraps(fake)
    def checked(*arguments: Any, **named: Any) -> Any:
        groups = [x if isinstance(x, list) else [x] for x in (*arguments, *named.values())]
        devices = {str(x.device) for group in groups for x in group if isinstance(x, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"vicinal: expected tensors on one device, got {sorted(devices)}")
        return fake(*arguments, **named)

    return checked


def register_gradient(
    op: str, backward: Callable[..., Any], setup: Callable[..., None] | None = None
) -> None:
    """`torch.library.register_autograd` of an op that refuses tensors with a tangent."""
    library = _library(op.partition("::")[0])
    torch.library.register_autograd(op, backward, setup_context=setup, lib=library)


class _RefusingLibrary(torch.library.Library):
    """A library whose autograd kernels refuse tensors with a tangent. Torch's kernel runs the op
    without autograd where nothing requires a gradient, and would drop the tangent.
    """

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> Any:
        @functools.wraps(fn)
        def checked(keyset: Any, *arguments: Any, **named: Any) -> Any:
            groups = [x if isinstance(x, list | tuple) else [x] for x in arguments]
            refuse_tangents(*(x for group in groups for x in group))
            return fn(keyset, *arguments, **named)

        return super().impl(op_name, checked, dispatch_key, **options)


@functools.cache
def _library(namespace: str) -> _RefusingLibrary:
    return _RefusingLibrary(namespace, "FRAGMENT")


def has_tangent(*arguments: Any) -> bool:
    """Whether a tensor among ``arguments`` has a tangent of forward-mode differentiation."""
    return any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments
    )


def refuse_tangents(*arguments: Any) -> None:
    """Raises NotImplementedError for tensors with a tangent: kernels would treat it as zero."""
    if has_tangent(*arguments):
        refuse_forward_mode()


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=lse_dtype)


def _fake_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    query_mask: Tensor | None, seed: Tensor | None, background: list[Tensor] | None,
    bias: Tensor | None, plan: list[Tensor], slices: list[int], scale: float, dropout_p: float,
    needs_queries: bool, needs_points: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:  # fmt: skip
    grads = new_gradients(q, k, v, needs_queries, needs_points)
    grad_background = [x.new_empty(x.shape) for x in background or () if needs_queries]
    return *grads, grad_background, new_bias_gradient(q, bias, needs_queries)


def new_bias_gradient(q: Tensor, bias: Tensor | None, needed: bool) -> Tensor:
    """Uninitialized, the gradient of the bias; without rows if it is not needed."""
    return q.new_empty(0, q.shape[1]) if bias is None or not needed else bias.new_empty(bias.shape)


def new_gradients(
    q: Tensor, k: Tensor, v: Tensor, needs_queries: bool, needs_points: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized gradients; those that are not needed have no rows."""
    needed = (q, needs_queries), (k, needs_points), (v, needs_points)
    grad_q, grad_k, grad_v = (
        x.new_empty(x.shape[0] if needs else 0, *x.shape[1:]) for x, needs in needed
    )
    return grad_q, grad_k, grad_v


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, query_mask, seed, background, bias, plan, *ctx.settings = inputs
    background = background or ()
    ctx.n_background = len(background)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, q, k, v, query_mask, seed, bias, *background, *plan)


def _backward_attention(
    op: Any, ctx: Any, needs: tuple[Any, ...], grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Any, ...]:
    out, lse, q, k, v, query_mask, seed, bias, *rest = ctx.saved_tensors
    background, plan = rest[: ctx.n_background], rest[ctx.n_background :]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if grad_lse is None:  # as in most training steps: one number for a GPU to read
        grad_lse = lse.new_zeros(()).expand_as(lse)
    needs_q, needs_k, needs_v, _, _, needs_background, needs_bias, *_ = needs
    # The gradients of background and bias are computed together with those of the queries.
    needs_queries = needs_q or any(needs_background) or needs_bias
    needs_points = needs_k or needs_v
    grad_q, grad_k, grad_v, grad_background, grad_bias = op(
        grad_out, grad_lse, out, lse, q, k, v, query_mask, seed, background, bias, plan,
        *ctx.settings, needs_queries, needs_points,
    )  # fmt: skip
    points = (grad_k, grad_v) if needs_points else (None, None)
    cells = grad_background or [None] * len(background), grad_bias if needs_bias else None
    without = [None] * len(plan), None, None, None
    return grad_q if needs_queries else None, *points, None, None, *cells, *without


def _fake_rotate(x: Tensor, coordinates: Tensor, frequencies: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_rotate_backward(
    grad_out: Tensor, out: Tensor, coordinates: Tensor, frequencies: Tensor,
    needs_coordinates: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_coordinates = new_coordinate_gradient(coordinates, needs_coordinates)
    return out.new_empty(out.shape), grad_coordinates, torch.empty_like(frequencies)


def new_coordinate_gradient(coordinates: Tensor, needed: bool) -> Tensor:
    """Uninitialized; without rows if it is not needed."""
    return coordinates.new_empty(coordinates.shape[0] if needed else 0, coordinates.shape[1])


def _setup_rotate(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    # The result, not the input: rotated by a right angle it is the derivative by the angles.
    ctx.save_for_backward(output, *inputs[1:])


def _backward_rotate(
    op: Any, ctx: Any, needs: tuple[bool, ...], grad_out: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    grad_x, grad_coordinates, grad_frequencies = op(grad_out, *ctx.saved_tensors, needs[1])
    return grad_x, grad_coordinates if needs[1] else None, grad_frequencies


def _fake_find_slices(
    sorted_keys: Tensor, query_keys: Tensor, traversal: Tensor, level: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor]:
    starts = query_keys.new_empty(query_keys.shape[1], len(level), dtype=torch.int32)
    return starts, torch.empty_like(starts)


def _fake_find_query_slices(
    positions: Tensor, offsets: Tensor, coordinates: Tensor, copies: Tensor, shifts: Tensor,
    levels: Tensor, slots: Tensor, numbers: list[int], key_dtype: torch.dtype,
    coordinate_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    (n_queries, dim), n_levels, n_slots = positions.shape, levels.shape[0], slots.shape[0]
    n_rows = coordinates.shape[0] + copies.shape[0]
    shapes: dict[str, tuple[int, ...]] = {
        "query_batch": (n_queries,),
        "query_groups": (n_levels, n_queries),
        "query_cells": (n_levels, dim, n_queries),
        "first_columns": (n_queries, n_levels),
        "query_keys": (n_levels, n_queries),
        "key_coordinates": (n_rows, dim + 1),
        "coordinates": (n_rows, dim + 2),
        "point_groups": (1, n_rows),
        "point_cells": (1, dim, n_rows),
        "sort_keys": (n_rows + n_queries,),
        "traversal": (n_queries,),
        "starts": (n_queries, n_slots),
        "stops": (n_queries, n_slots),
        "order": (n_rows,),
        "point_columns": (n_rows,),
    }
    dtypes = {"query_keys": key_dtype, "sort_keys": key_dtype, "key_coordinates": coordinate_dtype}
    return [
        positions.new_empty(shapes[name], dtype=dtypes.get(name, torch.int32))
        for name in QuerySlices._fields
    ]


def _fake_find_point_slices(
    query_keys: Tensor, point_keys: Tensor, groups: Tensor, cells: Tensor, slots: Tensor,
    numbers: list[int], n_levels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n_rows, n_slots = groups.shape[1], slots.shape[0] // n_levels
    starts, stops = (groups.new_empty(n_rows, n_slots) for _ in range(2))
    order = groups.new_empty(query_keys.shape[0] * query_keys.shape[1])
    return groups.new_empty(n_rows), starts, stops, order


def _fake_find_runs(
    traversal: Tensor, starts: Tensor, stops: Tensor, n_columns: int, slices: list[int], rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    n_tiles = (traversal.shape[0] + rows - 1) // rows
    firsts, shifts = (traversal.new_empty(n_tiles, rows * starts.shape[1]) for _ in range(2))
    return firsts, shifts, traversal.new_empty(n_tiles, len(slices), 2)


def list_space(n_tiles: int, rows: int, window_slots: int) -> int:
    """How many blocks the lists of ``n_tiles`` tiles of ``rows`` rows may have altogether.

    It depends on sizes alone, so that nothing waits for a GPU. Many tiles get space for what they
    need in common scenes, where their rows share most columns. A tile of one row gets space for
    ``window_slots``, which is all that it needs where a cell has one point at most. A tile that
    finds no space has no list; kernels then search its columns, which is several times slower.
    """
    own = -(-max(_ENTRIES_PER_ROW * rows, window_slots) // LIST_BLOCK)
    space: int = torch.sym_max(n_tiles * own, _LEAST_BLOCKS)  # the number may be a symbol
    return space


def _fake_find_lists(
    tiles: list[Tensor], windows: list[Tensor], slices: list[int], n_cells: int, rows: int,
    rows_are_queries: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    counts = tiles[4]
    n_tiles = counts.shape[0]
    space = list_space(n_tiles, rows, n_cells) * LIST_BLOCK
    return counts.new_empty(n_tiles, 2), counts.new_empty(space), counts.new_empty(space)


_FAKES: dict[str, Callable[..., Any]] = {
    "neighborhood_attention": _fake_attention,
    "neighborhood_attention_backward": _fake_attention_backward,
    "rotate": _fake_rotate,
    "rotate_backward": _fake_rotate_backward,
    "find_slices": _fake_find_slices,
    "find_query_slices": _fake_find_query_slices,
    "find_point_slices": _fake_find_point_slices,
    "find_runs": _fake_find_runs,
    "find_lists": _fake_find_lists,
}
