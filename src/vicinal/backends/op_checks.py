"""Checks of the arguments of ops: shapes, dtypes and devices, each exactly.

Kernels compute addresses from them. `csrc/checks.h` does the same for the ops in C++.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import refuse

_INDEX = torch.int32
_INTEGERS = torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64


def check_exact(
    argument: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raises ValueError unless ``x`` has the shape, the dtype and the device."""
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device:
        refuse(argument, f"a {dtype} tensor of shape {list(shape)} on {device}", x)


def check_dense(
    argument: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Likewise for a tensor that must be contiguous."""
    check_exact(argument, x, shape, dtype, device)
    if not x.is_contiguous():
        refuse(argument, "a contiguous tensor", f"strides {x.stride()} of shape {list(x.shape)}")


def check_dims(argument: str, x: Tensor, n: int) -> None:
    """Raises ValueError unless ``x`` has ``n`` dimensions."""
    if x.dim() != n:
        refuse(argument, f"a tensor of {n} dimensions", x)


def check_number(argument: str, tensors: Sequence[Tensor], *numbers: int) -> None:
    """Raises ValueError unless there is one of the ``numbers`` of tensors."""
    if len(tensors) not in numbers:
        refuse(argument, f"{' or '.join(map(str, numbers))} tensors", f"{len(tensors)}")


def check_slices(slices: Sequence[int]) -> None:
    """Raises ValueError unless there is a level, and each has a slice."""
    if not slices or min(slices) < 1:
        refuse("slices", "at least one for each level", slices)


def _check_floating(argument: str, x: Tensor) -> None:
    if not x.is_floating_point():
        refuse(argument, "a floating-point tensor", x)


def _check_attention(
    q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None, seed: Tensor | None,
    background: Sequence[Tensor] | None, bias: Tensor | None, plan: Sequence[Tensor],
    slices: Sequence[int], scale: float, dropout_p: float,
) -> None:  # fmt: skip
    """Checks all but ``plan``, whose form is the back end's own."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_dims(name, x, 3)
    _check_floating("q", q)
    (n, n_heads, width), n_points, value_width = q.shape, k.shape[0], v.shape[2]
    check_exact("k", k, (n_points, n_heads, width), q.dtype, q.device)
    check_exact("v", v, (n_points, n_heads, value_width), q.dtype, q.device)
    check_slices(slices)
    if not 0 <= dropout_p < 1:
        refuse("dropout_p", "a rate in [0, 1)", dropout_p)
    if query_mask is not None:
        check_exact("query_mask", query_mask, (n,), torch.bool, q.device)
    if seed is not None:
        check_exact("seed", seed, (), torch.int64, q.device)
    if background is None:  # which the compiled kernel alone takes
        refuse("background", "a list of tensors", background)
    check_number("background", background, 0, 3)
    if background:
        query, key, value = background
        check_dims("background.key", key, 3)
        check_dims("background.value", value, 4)
        cells = len(value), len(slices), n_heads, value_width
        check_exact("background.query", query, (n, len(slices), n_heads, width), q.dtype, q.device)
        check_exact("background.key", key, (len(key), n_heads, width), q.dtype, q.device)
        check_exact("background.value", value, cells, q.dtype, q.device)
    if bias is not None:
        check_dims("bias", bias, 2)
        n_cells = len(background[1]) if background else len(bias)
        check_exact("bias", bias, (n_cells, n_heads), q.dtype, q.device)


def _check_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, *arguments: Any
) -> None:
    forward = arguments[:-2]  # without what needs gradients
    _check_attention(*forward)
    q, _, v, *_ = forward
    shape, lse_dtype = (*q.shape[:2], v.shape[2]), torch.promote_types(q.dtype, torch.float32)
    for name, x in (("grad_out", grad_out), ("out", out)):
        check_exact(name, x, shape, q.dtype, q.device)
    check_exact("grad_lse", grad_lse, shape[:2], lse_dtype, q.device)
    check_dense("lse", lse, shape[:2], lse_dtype, q.device)


def _check_rotate(x: Tensor, coordinates: Tensor, frequencies: Tensor) -> None:
    check_dims("x", x, 3)
    _check_floating("x", x)
    check_dims("coordinates", coordinates, 2)
    (n, n_heads, width), axes = x.shape, coordinates.shape[1]
    if width % 2 or not axes:
        refuse("x", "an even width, and coordinates of at least one column", f"{width} and {axes}")
    shapes = {
        "coordinates": (coordinates, (n, axes)),
        "frequencies": (frequencies, (axes, n_heads, width // 2)),
    }
    for name, (part, shape) in shapes.items():
        _check_floating(name, part)
        check_dense(name, part, shape, part.dtype, x.device)


def _check_rotate_backward(
    grad_out: Tensor, out: Tensor, coordinates: Tensor, frequencies: Tensor,
    needs_coordinates: bool,
) -> None:  # fmt: skip
    _check_rotate(out, coordinates, frequencies)
    check_exact("grad_out", grad_out, out.shape, out.dtype, out.device)


def _check_find_slices(
    sorted_keys: Tensor, query_keys: Tensor, traversal: Tensor, level: Tensor, first: Tensor,
    width: Tensor,
) -> None:  # fmt: skip
    check_dims("query_keys", query_keys, 2)
    check_dims("level", level, 1)
    if not len(query_keys):
        refuse("query_keys", "at least one level", query_keys)
    device, long = query_keys.device, torch.int64
    check_exact("sorted_keys", sorted_keys, (sorted_keys.numel(),), long, device)
    check_exact("query_keys", query_keys, query_keys.shape, long, device)
    check_dense("traversal", traversal, query_keys.shape[1:], _INDEX, device)
    for name, x in (("level", level), ("first", first), ("width", width)):
        check_exact(name, x, level.shape, long, device)


def _check_find_query_slices(
    positions: Tensor, offsets: Tensor, coordinates: Tensor, copies: Tensor, shifts: Tensor,
    levels: Tensor, slots: Tensor, numbers: Sequence[int], key_dtype: torch.dtype,
    coordinate_dtype: torch.dtype,
) -> None:  # fmt: skip
    check_dims("positions", positions, 2)
    _check_floating("positions", positions)
    dim, device, long = positions.shape[1], positions.device, torch.int64
    if offsets.dim() != 1 or not len(offsets) or offsets.dtype not in _INTEGERS:
        refuse("offsets", "at least one integer", offsets)
    check_dense("offsets", offsets, offsets.shape, offsets.dtype, device)
    check_dims("coordinates", coordinates, 2)
    check_exact("coordinates", coordinates, (len(coordinates), dim + 2), long, device)
    check_dims("copies", copies, 1)
    check_dense("copies", copies, copies.shape, long, device)
    check_dense("shifts", shifts, (len(copies), dim), long, device)
    if key_dtype not in (_INDEX, long):
        refuse("key_dtype", "torch.int32 or torch.int64", key_dtype)
    _check_table("levels", levels, 2 + 6 * dim, long, device)
    _check_table("slots", slots, 4, key_dtype, device)
    _check_numbers(numbers, len(levels))
    if not coordinate_dtype.is_floating_point:
        refuse("coordinate_dtype", "a floating dtype", coordinate_dtype)


def _check_find_point_slices(
    query_keys: Tensor, point_keys: Tensor, groups: Tensor, cells: Tensor, slots: Tensor,
    numbers: Sequence[int], n_levels: int,
) -> None:  # fmt: skip
    check_dims("query_keys", query_keys, 2)
    check_dims("cells", cells, 3)
    n_points, device = cells.shape[2], query_keys.device
    if query_keys.dtype not in (_INDEX, torch.int64) or len(query_keys) != n_levels or not n_levels:
        refuse("query_keys", f"int32 or int64 keys of {n_levels} levels", query_keys)
    check_dense("query_keys", query_keys, query_keys.shape, query_keys.dtype, device)
    check_dense("point_keys", point_keys, (n_points,), query_keys.dtype, device)
    check_dense("groups", groups, (1, n_points), _INDEX, device)
    check_dense("cells", cells, (1, *cells.shape[1:]), _INDEX, device)
    _check_table("slots", slots, 4, query_keys.dtype, device)
    if len(slots) % n_levels:
        refuse("slots", f"the same number of rows for each of {n_levels} levels", slots)
    _check_numbers(numbers, n_levels)


def _check_table(
    argument: str, table: Tensor, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    check_dims(argument, table, 2)
    if not len(table):
        refuse(argument, "at least one row", table)
    check_dense(argument, table, (len(table), width), dtype, device)


def _check_numbers(numbers: Sequence[int], n_levels: int) -> None:
    """See `_index.kernel_tables.KernelTables`."""
    if len(numbers) != 6 or min(numbers) < 0 or numbers[3] >= n_levels or numbers[5] < 1:
        expected = "6 integers that are not negative: images, keys, bits, level, 0 or 1, width"
        refuse("numbers", expected, numbers)


def _check_find_runs(
    traversal: Tensor, starts: Tensor, stops: Tensor, n_columns: int, slices: Sequence[int],
    rows: int,
) -> None:  # fmt: skip
    check_slices(slices)
    check_dims("traversal", traversal, 1)
    if rows < 1:
        refuse("rows", "at least 1", rows)
    shape = len(traversal), sum(slices)
    check_dense("traversal", traversal, shape[:1], _INDEX, traversal.device)
    for name, x in (("starts", starts), ("stops", stops)):
        check_dense(name, x, shape, _INDEX, traversal.device)


def _check_project(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], norm: Sequence[Tensor],
    eps: float, residual: Tensor | None,
) -> None:  # fmt: skip
    """See `backends.reference.project`."""
    _check_rows(x, norm)
    kind = x.dtype, x.device
    check_number("biases", biases, *{0, len(weights)})
    for index, weight in enumerate(weights):
        check_dims(f"weights[{index}]", weight, 2)
        n_out = weight.shape[0]
        check_exact(f"weights[{index}]", weight, (n_out, x.shape[1]), *kind)
        if biases:
            check_exact(f"biases[{index}]", biases[index], (n_out,), *kind)
        if residual is not None:
            check_exact("residual", residual, (x.shape[0], n_out), *kind)


def _check_project_backward(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], norm: Sequence[Tensor],
    eps: float, needs_x: bool, *_: bool,
) -> None:  # fmt: skip
    """See `backends.cpu.projections.project_backward`."""
    _check_rows(x, norm)
    n, width = x.shape
    check_number("weights", weights, *({len(grads)} if needs_x else {0, len(grads)}))
    for index, grad in enumerate(grads):
        check_dims(f"grads[{index}]", grad, 2)
        n_out = grad.shape[1]
        check_exact(f"grads[{index}]", grad, (n, n_out), x.dtype, x.device)
        if weights:
            name = f"weights[{index}]"
            check_exact(name, weights[index], (n_out, width), x.dtype, x.device)


def _check_rows(x: Tensor, norm: Sequence[Tensor]) -> None:
    check_dims("x", x, 2)
    _check_floating("x", x)
    check_number("norm", norm, 0, 2)
    for index, part in enumerate(norm):
        check_exact(f"norm[{index}]", part, x.shape[1:], x.dtype, x.device)


def _check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    check_dims("x", x, 2)
    _check_floating("x", x)
    # Weights may be wider than half-precision rows.
    dtype = torch.float32 if weight.dtype == torch.float32 and x.itemsize == 2 else x.dtype
    check_exact("weight", weight, x.shape[1:], dtype, x.device)
    if bias is not None:
        check_exact("bias", bias, x.shape[1:], dtype, x.device)


def _check_layer_norm_backward(
    grad_out: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, *_: bool
) -> None:
    _check_layer_norm(x, weight, None, 0.0)
    check_exact("grad_out", grad_out, x.shape, x.dtype, x.device)
    for name, part in (("mean", mean), ("inverse_std", inverse_std)):
        check_exact(name, part, (len(x), 1), weight.dtype, x.device)


def _check_sample(
    table: Tensor, locations: Tensor, weights: Tensor, images: Tensor, index: Sequence[Tensor],
    sizes: Sequence[int], periodic: Sequence[int], has_background: bool,
) -> None:  # fmt: skip
    """See `backends.sampling_ops`."""
    check_dims("locations", locations, 5)
    check_dims("table", table, 3)
    *counts, n_axes = locations.shape
    n_queries, n_heads, n_levels, _ = counts
    for name, x in (("table", table), ("locations", locations)):
        if x.dtype not in (torch.float32, torch.float64):
            refuse(name, "a float32 or float64 tensor", x)
    device, long = table.device, torch.int64
    check_exact("table", table, (len(table), n_heads, table.shape[2]), table.dtype, device)
    check_exact("locations", locations, locations.shape, locations.dtype, device)
    check_exact("weights", weights, counts, table.dtype, device)
    check_dense("images", images, (n_queries,), long, device)
    check_number("index", index, 5)
    if not 1 <= n_axes <= 16:
        refuse("locations", "1 to 16 axes", n_axes)
    _check_hash_table(index, n_levels, n_axes, device)
    n_images = len(index[0])
    if n_queries and not n_images:
        refuse("index.origins", "an image for queries", index[0])
    if (len(sizes), len(periodic)) != (n_levels * n_axes, n_axes):
        expected = f"{n_levels * n_axes} sizes and {n_axes} periods"
        refuse("sizes and periodic", expected, f"{len(sizes)} and {len(periodic)}")
    n_empty = n_images * n_levels if has_background else 0
    if len(table) < n_empty:
        refuse("table", f"at least {n_empty} rows, those of empty cells", table)


def _check_hash_table(
    index: Sequence[Tensor], n_levels: int, n_axes: int, device: torch.device
) -> None:
    """See `_index.cell_hash.CellIndex`."""
    origins, steps, starts, keys, corners = index
    check_dims("index.origins", origins, 2)
    check_dims("index.starts", starts, 1)
    check_dims("index.keys", keys, 1)
    n_images, n_buckets, n_entries, long = len(origins), len(starts), len(keys), torch.int64
    if n_buckets.bit_count() != 1:
        refuse("index.starts", "a power of two of rows", starts)
    check_dense("index.origins", origins, (n_images, n_levels), long, device)
    check_dense("index.steps", steps, (n_axes, n_levels), long, device)
    check_dense("index.starts", starts, (n_buckets,), _INDEX, device)
    check_dense("index.keys", keys, (n_entries,), long, device)
    check_dense("index.corners", corners, (n_entries, 2**n_axes), _INDEX, device)


def _check_sample_backward(grad_out: Tensor, table: Tensor, *arguments: Any) -> None:
    _check_sample(table, *arguments)
    shape = len(arguments[0]), *table.shape[1:]
    check_exact("grad_out", grad_out, shape, table.dtype, table.device)


_CHECKS: dict[str, Callable[..., None]] = {
    "neighborhood_attention": _check_attention,
    "neighborhood_attention_backward": _check_attention_backward,
    "rotate": _check_rotate,
    "rotate_backward": _check_rotate_backward,
    "find_slices": _check_find_slices,
    "find_query_slices": _check_find_query_slices,
    "find_point_slices": _check_find_point_slices,
    "find_runs": _check_find_runs,
    "project": _check_project,
    "project_backward": _check_project_backward,
    "sample": _check_sample,
    "sample_backward": _check_sample_backward,
    "layer_norm": _check_layer_norm,
    "layer_norm_backward": _check_layer_norm_backward,
}


def checked(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` of the op ``name``, run after the checks of its arguments, if it has any."""
    check = _CHECKS.get(name)
    if check is None:
        return kernel

    @functools.wraps(kernel)
    def run(*arguments: Any) -> Any:
        check(*arguments)
        return kernel(*arguments)

    return run
