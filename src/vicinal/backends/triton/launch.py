"""Arguments of the kernels, made of tensors, and how kernels are launched."""

import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._utils.constants import cached_on_gpu, constant
from ..types import LIST_BLOCK, TILE, Tiles, WindowTables
from . import interprets
from .background import EmptyCells
from .checks import plan_parts
from .parts import Rows
from .tile_walk import SIZES_FIELD, Walk, WindowArguments

INTERPRETS = interprets()  # kernels run on the CPU, for tests
ON_AMD = torch.version.hip is not None
_MIN_WIDTH = 16  # the minimum size of `tl.dot`
_NARROW = 32  # channels of a head
_WIDEST_ROW = 256  # bytes of a head, of which a program holds all rows of a tile
_WIDEST_SPLIT = 64  # channels of a head of float32 that is split into parts of TF32


def launch(kernel: Any, n_programs: int, *arguments: Any, num_warps: int, **constants: Any) -> None:
    """Runs ``n_programs`` programs of a kernel; zero is allowed.

    At each call Triton would bind the arguments by name, look up what it compiled for arguments
    like these, and compare all global constants. Here it does that once for each `specialization`;
    later calls run the compiled kernel.
    """
    if not n_programs:
        return
    if INTERPRETS:
        _run(kernel, n_programs, arguments, num_warps, constants)
        return
    values = tuple([constants[name] for name in kernel.arg_names[len(arguments) :]])
    key = (
        id(kernel), torch.cuda.current_device(), num_warps, values, specialization(arguments)
    )  # fmt: skip
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _run(kernel, n_programs, arguments, num_warps, constants)
        if compiled is not None:  # a hook of Triton may prevent compiling
            _compiled[key] = compiled
    else:
        compiled[(n_programs, 1, 1)](*arguments, *values)


def _run(
    kernel: Any, n_programs: int, arguments: tuple[Any, ...], num_warps: int,
    constants: dict[str, Any],
) -> Any:  # fmt: skip
    """Has Triton compile a kernel and run it; returns what it compiled."""
    # A product and a sum are rounded once. Triton's default varies with its version.
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    return kernel[(n_programs,)](*arguments, **options, **constants)


def specialization(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What of the arguments decides which variant of a kernel Triton compiles.

    That is the dtype of a tensor, whether its address is a multiple of 16, and on cards of AMD
    whether its bytes can be counted by int32; whether an integer is one, a multiple of 16, or
    beyond int32; and which arguments are None.
    """
    return tuple([_SPECIALIZATIONS[type(x)](x) for x in arguments])


def _of_tensor(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.data_ptr() % 16, ON_AMD and x.untyped_storage().nbytes() < 2**31


def _of_integer(x: int) -> bool | tuple[bool, ...]:
    if 1 < x < 2**31:  # as almost always
        return x % 16 == 0
    return x == 1, x % 16 == 0, -(2**31) <= x < 2**31, x < 2**63


class _Specializations(dict[type, Callable[[Any], Any]]):
    """A function for each type of argument; subclasses are added as they appear."""

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        if issubclass(kind, Tensor):
            self[kind] = _of_tensor
        elif issubclass(kind, tuple):
            self[kind] = specialization
        else:
            self[kind] = type
        return self[kind]


_SPECIALIZATIONS = _Specializations({Tensor: _of_tensor, int: _of_integer, tuple: specialization})
_compiled: dict[Any, Any] = {}


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Makes the device of ``x`` the current one, to which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def cdiv(size: int, part: int) -> int:
    """``size / part``, rounded up."""
    return -(-size // part)


def power_of_2(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def heads(x: Tensor) -> Rows:
    """``x`` ``[n, H, width]`` as `Rows`, copied only if its strides do not allow it."""
    n_heads, (row_stride, head_stride, channel_stride) = x.shape[1], x.stride()
    if channel_stride != 1 or head_stride * n_heads >= 2**31:
        x = x.contiguous()
        row_stride, head_stride, _ = x.stride()
    return Rows(x, row_stride, head_stride if n_heads > 1 else row_stride)


def _heads_in_tuple(x: Tensor) -> Rows:
    """`heads` for a tuple of arguments, inside of which Triton 3.6 loses `Rows` of stride one."""
    return heads(F.pad(x, (0, 1))[..., :-1] if 1 in x.stride()[:2] else x)


def new_for_tuple(x: Tensor, *shape: int) -> Tensor:
    """Uninitialized, with room beside single channels: `heads` of it may be in a tuple, too."""
    return x.new_empty(*shape[:-1], max(shape[-1], 2))[..., : shape[-1]]


class Grid(NamedTuple):
    """Programs of a launch, one for each part of a tile and head."""

    n_parts: int
    n_heads: int
    rows: int  # of a part
    tile_rows: int
    num_warps: int

    @property
    def n_programs(self) -> int:
        return self.n_parts * self.n_heads

    def constants(self) -> dict[str, int]:
        """What kernels are compiled for."""
        return {"ROWS": self.rows, "TILE_ROWS": self.tile_rows, "num_warps": self.num_warps}


class AttentionArguments:
    """Kernel arguments that the attention ops have in common, made of the ops' arguments.

    Attributes:
        n_levels, n_heads: L and H.
        slices: the number of rows of each level's windows.
        background: the op's ``background``: query, key and value, or nothing.
        heads: q, k and v as `Rows`.
        query_ids, column_ids: see `PlanTensors`.
        tables: the `WindowTables`.
        constants: sizes that kernels are compiled for.
        query_tiles: the `Tiles` of queries.
        query_walk, point_walk: the `Walk` of each pass; the second only for backward passes.
        query_grid, point_grid: the `Grid` of each pass.
        cells: the `EmptyCells`, or None without a background.
        n_warps: the number of warps of a program that works on so many rows.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None,
        background: list[Tensor], plan: list[Tensor], slices: list[int], plain: bool,
    ) -> None:  # fmt: skip
        """``plain``: without dropout and bias; the other arguments are those of the ops."""
        parts = plan_parts(plan)
        tiles, self.tables = parts.query_tiles, parts.windows
        self.query_ids, self.column_ids = parts.query_ids, parts.column_ids
        self._windows = window_arguments(self.tables, slices)
        self.query_tiles, self.slices, self.background = tiles, slices, background
        self.n_levels, self.n_heads = len(slices), k.shape[1]
        self.heads = [heads(x) for x in (q, k, v)]
        self._most_rows, plain = _most_rows(k, v), plain and not background
        self.constants = _constants(k, v) | window_constants(self.tables, slices)
        self.n_warps = partial(_n_warps, k, v, plain)

        row_mask = None if query_mask is None else query_mask.contiguous()
        n_queries, n_points = q.shape[0], k.shape[0]
        self.query_walk = self._walk(tiles, n_queries, n_points, row_mask)
        self.query_grid = self._grid(tiles, sum(slices))
        if parts.point_tiles is not None:
            self.point_walk = self._walk(parts.point_tiles, n_points, n_queries)
            self.point_grid = self._grid(parts.point_tiles, max(slices))
        self.cells: EmptyCells | None = None
        if background:
            query, key, value = background
            self.cells = EmptyCells(
                _heads_in_tuple(query.flatten(0, 1)), _heads_in_tuple(key),
                _heads_in_tuple(value.flatten(0, 1)),
                parts.starts, parts.stops, parts.point_columns, sum(slices), len(key),
            )  # fmt: skip

    def _walk(
        self, tiles: Tiles, n_rows: int, n_items: int, row_mask: Tensor | None = None
    ) -> Walk:
        n_groups = len(self.background[2]) * self.n_levels if self.background else 0
        return walk_of(tiles, self._windows, n_rows, n_items, self.n_heads, n_groups, row_mask)

    def _grid(self, tiles: Tiles, n_slices: int) -> Grid:
        """``n_slices``: slices per row."""
        n_tiles, capacity = tiles.firsts.shape
        tile_rows = capacity // n_slices
        rows = min(tile_rows, self._most_rows)
        n_parts = n_tiles * tile_rows // rows
        return Grid(n_parts, self.n_heads, rows, tile_rows, self.n_warps(rows))


def window_constants(tables: WindowTables, slices: list[int]) -> dict[str, int]:
    """What kernels that compare cells are compiled for."""
    dim = tables.levels.shape[1] - SIZES_FIELD.value
    return {"DIM": dim, "LEVELS": len(slices), "BALL_ROWS": len(tables.box_rows)}


def window_arguments(tables: WindowTables, slices: list[int]) -> WindowArguments:
    """The windows of these ``tables`` and ``slices``."""
    return WindowArguments(_level_slices(tuple(slices), tables.rows.device), *tables[:3])


def walk_of(
    tiles: Tiles, windows: WindowArguments, n_rows: int, n_items: int, n_heads: int,
    n_groups: int = 0, row_mask: Tensor | None = None,
) -> Walk:  # fmt: skip
    """The `Walk` over tiles."""
    n_columns, n_runs = tiles.order.shape[0], tiles.firsts.shape[1]
    n_blocks = tiles.items.shape[0] // LIST_BLOCK
    return Walk(
        tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads, row_mask
    )


@cached_on_gpu
def _level_slices(slices: tuple[int, ...], device: torch.device) -> Tensor:
    """`WindowArguments.slices`."""
    before = itertools.accumulate(slices, initial=0)
    return constant(list(zip(slices, before, strict=False)), device, torch.int32)


def widths(k: Tensor, v: Tensor) -> dict[str, int]:
    """The widths of heads, d and dv, and powers of two to which kernels pad them."""
    return {
        "WIDTH": k.shape[2],
        "PADDED": max(_MIN_WIDTH, power_of_2(k.shape[2])),
        "VALUE_WIDTH": v.shape[2],
        "VALUE_PADDED": max(_MIN_WIDTH, power_of_2(v.shape[2])),
    }


def precision(dtype: torch.dtype, width: int) -> str:
    """How `parts.dot` multiplies heads of a width.

    TF32 alone if torch is set to multiply matrices with it. Three products take more registers than
    there are for the widest heads.
    """
    if dtype != torch.float32 or ON_AMD:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if width <= _WIDEST_SPLIT else "ieee"


def _most_rows(k: Tensor, v: Tensor) -> int:
    """Rows of a program: those of a tile, or fewer if shared memory does not hold as many."""
    return TILE if _padded_width(k, v) * k.element_size() <= _WIDEST_ROW else _MIN_WIDTH


def _n_warps(k: Tensor, v: Tensor, plain: bool, rows: int) -> int:
    """As many warps as hold the rows of a program in registers.

    float32 takes twice the registers, and each number is split in two parts for matrix units.
    Narrow heads without options (``plain``) leave enough for the rows of a whole tile.
    """
    width = _padded_width(k, v)
    half = k.dtype != torch.float32
    warps = min(max(width // 32, 1), 4) if half else min(max(width // 16, 2), 8)
    return warps if rows <= _MIN_WIDTH or (plain and width <= _NARROW) else 2 * warps


def _constants(k: Tensor, v: Tensor) -> dict[str, Any]:
    """Sizes that kernels are compiled for."""
    return {
        **widths(k, v),
        "PRECISION": precision(k.dtype, _padded_width(k, v)),
        "BLOCK": 32 if k.dtype != torch.float32 else 16,
    }


def _padded_width(k: Tensor, v: Tensor) -> int:
    return max(_MIN_WIDTH, power_of_2(max(k.shape[2], v.shape[2])))
