"""Planning in Triton: cells and keys of queries and points, slices of windows, runs of tiles.

The kernels compute bit by bit what the plain torch code of `plan` does. Keys are int32
where that holds all of them, else int64. The *level table*, int64, has a row per level, with the
fields below; `_index.kernel_tables` fills it.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(2**63 - 1)
LARGEST_INT32 = tl.constexpr(2**31 - 1)
WARP = tl.constexpr(32)  # threads; AMD has 64
FARTHEST = tl.constexpr(2**31 - 128)  # the largest float32 that int32 can hold

# Fields of a row of the level table, then of each axis within it.
BASE, VOLUME, FIELDS = (tl.constexpr(field) for field in range(3))
SIZE, STRIDE, FULL_SIZE, LAST_CELL, PAD, BEFORE, AXIS_FIELDS = (
    tl.constexpr(field) for field in range(7)
)

# Fields of a row of the slot table: the slices of a window.
KEY_ROW, FIRST_KEY, LAST_KEY, IS_USED, SLOT_FIELDS = (tl.constexpr(x) for x in range(5))


@triton.jit
def load_field(table_ptr, level, FIELD: tl.constexpr, DIM: tl.constexpr):
    """A field of the level table, int64, of a level or of a block of levels."""
    return tl.load(table_ptr + level * (FIELDS + AXIS_FIELDS * DIM) + FIELD)


@triton.jit
def load_axis_field(table_ptr, level, axis: tl.constexpr, FIELD: tl.constexpr, DIM: tl.constexpr):
    """A field of an axis of the level table, int64, of a level or of a block of levels."""
    row_ptr = table_ptr + level * (FIELDS + AXIS_FIELDS * DIM)
    return tl.load(row_ptr + FIELDS + axis * AXIS_FIELDS + FIELD)


@triton.jit
def find_image(offsets_ptr, query, n_offsets):
    """The last image whose offset is not beyond a query, int32 ``[BLOCK]``, or -1."""
    image = tl.zeros_like(query).to(tl.int32)  # [BLOCK]
    span = n_offsets
    while span > 1:
        half = span // 2
        offset = tl.load(offsets_ptr + image + half).to(tl.int64)  # [BLOCK]
        image = tl.where(offset <= query, image + half, image)
        span -= half
    return tl.where(tl.load(offsets_ptr + image).to(tl.int64) <= query, image, -1)


@triton.jit
def load_position(positions_ptr, query, valid, axis, row_stride, column_stride,
                  DOUBLE: tl.constexpr):  # fmt: skip
    """One coordinate of queries, float64 or float32 ``[BLOCK]``."""
    ptrs = positions_ptr + query * row_stride + axis * column_stride  # [BLOCK]
    x = tl.load(ptrs, mask=valid, other=0.0)  # [BLOCK]
    return x.to(tl.float64) if DOUBLE else x.to(tl.float32)


@triton.jit
def spread_bits(cell, n_bits, SHIFT: tl.constexpr, DIM: tl.constexpr, key_dtype: tl.constexpr):
    """The lowest bits of cells ``[BLOCK]``, ``DIM`` apart from bit ``SHIFT`` on."""
    bits, spread = tl.maximum(cell, 0).to(key_dtype), tl.zeros_like(cell).to(key_dtype)  # [BLOCK]
    for bit in range(n_bits):
        spread |= ((bits >> bit) & 1) << (bit * DIM + SHIFT)
    return spread


@triton.jit(do_not_specialize=("row_stride", "column_stride", "n_queries", "n_points", "n_offsets",
                               "n_images", "n_keys", "n_bits"))  # fmt: skip
def place_queries(positions_ptr, offsets_ptr, table_ptr, images_ptr, groups_ptr, cells_ptr,
                  columns_ptr, query_keys_ptr, sort_keys_ptr, row_stride, column_stride,
                  n_queries, n_points, n_offsets, n_images, n_keys, n_bits,
                  DIM: tl.constexpr, LEVELS: tl.constexpr, FINEST: tl.constexpr,
                  DOUBLE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The image of every query, its windows' first cells, their keys, and its traversal key.

    Args:
        positions_ptr: floating ``[N, P]`` with the strides ``row_stride`` and ``column_stride``.
        offsets_ptr: integer ``[n_offsets]``.
        table_ptr: int64, the level table.
        images_ptr: int32 ``[N]``, a result, -1 for an invalid query, as are the next ones.
        groups_ptr: int32 ``[L, N]``.
        cells_ptr: int32 ``[L, P, N]``.
        columns_ptr: int32 ``[N, L]``, the last coordinate of each first cell.
        query_keys_ptr: ``[L, N]``.
        sort_keys_ptr: ``[nnz + N]``, of which the last N are written.
        n_queries, n_points, n_images: N, nnz and B.
        n_keys: the number from which traversal keys start.
        n_bits: bits per axis of the curve along which queries are traversed.
        FINEST: the level whose cells are put along the curve.
        DOUBLE: whether centers are computed in float64.
        BLOCK: queries of a program.
    """
    key_dtype: tl.constexpr = query_keys_ptr.dtype.element_ty
    query = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = query < n_queries  # [BLOCK]
    image = find_image(offsets_ptr, query, n_offsets)  # [BLOCK]
    active = valid & (image >= 0) & (image < n_images)  # [BLOCK]
    for axis in tl.static_range(DIM):
        x = load_position(positions_ptr, query, valid, axis, row_stride, column_stride, DOUBLE)
        active &= tl.abs(x) < float("inf")
    image = tl.where(active, image, -1)
    tl.store(images_ptr + query, image, mask=valid)
    for level in tl.static_range(LEVELS):
        tl.store(
            groups_ptr + level * n_queries.to(tl.int64) + query,
            tl.where(active, image * LEVELS + level, -1), mask=valid,
        )  # fmt: skip
        volume = load_field(table_ptr, level, VOLUME, DIM).to(key_dtype)
        key = tl.maximum(image, 0).to(key_dtype) * volume  # [BLOCK]
        key += load_field(table_ptr, level, BASE, DIM).to(key_dtype)
        curve = tl.zeros_like(key)  # [BLOCK]
        for axis in tl.static_range(DIM):
            x = load_position(positions_ptr, query, valid, axis, row_stride, column_stride, DOUBLE)
            size = load_axis_field(table_ptr, level, axis, SIZE, DIM)
            full_size = load_axis_field(table_ptr, level, axis, FULL_SIZE, DIM)
            scale = (size.to(tl.float64) / full_size.to(tl.float64)).to(x.dtype)
            center = tl.minimum(tl.maximum(tl.floor(x * scale), -FARTHEST), FARTHEST)
            center = tl.where(active, center, -FARTHEST).to(tl.int32)  # [BLOCK]
            center = tl.minimum(
                center, load_axis_field(table_ptr, level, axis, LAST_CELL, DIM).to(tl.int32)
            )
            pad = load_axis_field(table_ptr, level, axis, PAD, DIM).to(tl.int32)
            before = load_axis_field(table_ptr, level, axis, BEFORE, DIM).to(tl.int32)
            size = size.to(tl.int32)
            cell = tl.minimum(tl.maximum(center, before - pad), size + before) - before  # [BLOCK]
            offset = (level * DIM + axis) * n_queries.to(tl.int64) + query  # [BLOCK]
            tl.store(cells_ptr + offset, cell, mask=valid)
            stride = load_axis_field(table_ptr, level, axis, STRIDE, DIM).to(key_dtype)
            key += (cell.to(key_dtype) + pad) * stride
            if axis == DIM - 1:
                tl.store(columns_ptr + query * LEVELS + level, cell, mask=valid)
            if level == FINEST:
                center = tl.minimum(center, size)
                curve |= spread_bits(center, n_bits, DIM - 1 - axis, DIM, key_dtype)
        tl.store(query_keys_ptr + level * n_queries.to(tl.int64) + query, key, mask=valid)
        if level == FINEST:
            curve += ((image + 1).to(key_dtype) << (n_bits * DIM)) + n_keys.to(key_dtype)
            tl.store(sort_keys_ptr + n_points.to(tl.int64) + query, curve, mask=valid)


@triton.jit(do_not_specialize=("row_stride", "column_stride", "n_points", "n_rows", "n_images"))
def place_points(coordinates_ptr, copies_ptr, shifts_ptr, table_ptr, key_coordinates_ptr,
                 placed_ptr, groups_ptr, cells_ptr, sort_keys_ptr, row_stride, column_stride,
                 n_points, n_rows, n_images,
                 DIM: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The group, the cell and the key of every point, and of the copies of points after them.

    Args:
        coordinates_ptr: int64 ``[nnz, P + 2]`` with the strides ``row_stride``,
            ``column_stride``.
        copies_ptr, shifts_ptr: int64 ``[C]`` and ``[C, P]``, see `_index.copies`.
        table_ptr: int64, the level table.
        key_coordinates_ptr: floating ``[nnz + C, P + 1]``, a result: the center of each cell as a
            position, and the level.
        placed_ptr: int32 ``[nnz + C, P + 2]``, a result, the coordinates, 0 for a misplaced point.
        groups_ptr: int32 ``[nnz + C]``, a result, -2 for a misplaced point.
        cells_ptr: int32 ``[P, nnz + C]``, a result, 0 for a misplaced point.
        sort_keys_ptr: ``[nnz + C]`` or longer, a result, -1 for a misplaced point.
        n_points, n_rows, n_images: nnz, nnz + C and B.
        BLOCK: points of a program.
    """
    key_dtype: tl.constexpr = sort_keys_ptr.dtype.element_ty
    coordinate_dtype: tl.constexpr = key_coordinates_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = row < n_rows  # [BLOCK]
    copy = row - n_points  # [BLOCK]
    is_copy = valid & (copy >= 0)  # [BLOCK]
    point = tl.where(is_copy, tl.load(copies_ptr + copy, mask=is_copy, other=0), row)  # [BLOCK]
    inside = valid & (point >= 0) & (point < n_points)  # [BLOCK]
    point_ptr = coordinates_ptr + point * row_stride  # [BLOCK]
    image = tl.load(point_ptr, mask=inside, other=-1)  # [BLOCK]
    level = tl.load(point_ptr + (DIM + 1) * column_stride, mask=inside, other=-1)  # [BLOCK]
    readable = inside  # [BLOCK]
    inside = inside & (image >= 0) & (image < n_images) & (level >= 0) & (level < LEVELS)
    level = tl.where(inside, level, 0)
    for axis in tl.static_range(DIM):
        cell = tl.load(point_ptr + (axis + 1) * column_stride, mask=readable, other=-1)  # [BLOCK]
        inside &= (cell >= 0) & (cell < load_axis_field(table_ptr, level, axis, SIZE, DIM))
    level, image = tl.where(inside, level, 0), tl.where(inside, image, 0)
    key = load_field(table_ptr, level, BASE, DIM)  # int64 [BLOCK]
    key += image * load_field(table_ptr, level, VOLUME, DIM)
    for axis in tl.static_range(DIM):
        cell = tl.load(point_ptr + (axis + 1) * column_stride, mask=inside, other=0)  # [BLOCK]
        cell += tl.load(shifts_ptr + copy * DIM + axis, mask=is_copy & inside, other=0)
        pad = load_axis_field(table_ptr, level, axis, PAD, DIM)  # [BLOCK]
        key += (cell + pad) * load_axis_field(table_ptr, level, axis, STRIDE, DIM)
        size = load_axis_field(table_ptr, level, axis, SIZE, DIM).to(tl.float64)  # [BLOCK]
        full_size = load_axis_field(table_ptr, level, axis, FULL_SIZE, DIM).to(tl.float64)
        half = tl.full([], 0.5, tl.float64)  # a Python number would be float32
        position = (cell.to(tl.float64) + half) / (size / full_size)  # [BLOCK]
        key_coordinate_ptr = key_coordinates_ptr + row * (DIM + 1) + axis  # [BLOCK]
        tl.store(key_coordinate_ptr, position.to(coordinate_dtype), mask=valid)
        tl.store(cells_ptr + axis * n_rows.to(tl.int64) + row, cell.to(tl.int32), mask=valid)
        tl.store(placed_ptr + row * (DIM + 2) + axis + 1, cell.to(tl.int32), mask=valid)
    key_coordinate_ptr = key_coordinates_ptr + row * (DIM + 1) + DIM  # [BLOCK]
    tl.store(key_coordinate_ptr, level.to(coordinate_dtype), mask=valid)
    tl.store(placed_ptr + row * (DIM + 2), image.to(tl.int32), mask=valid)
    tl.store(placed_ptr + row * (DIM + 2) + DIM + 1, level.to(tl.int32), mask=valid)
    group = tl.where(inside, image * LEVELS + level, -2)  # [BLOCK]
    tl.store(groups_ptr + row, group.to(tl.int32), mask=valid)
    tl.store(sort_keys_ptr + row, tl.where(inside, key, -1).to(key_dtype), mask=valid)


@triton.jit(do_not_specialize=("n_query_keys", "n_rows", "n_images", "n_keys", "n_bits"))
def place_along_curve(query_keys_ptr, groups_ptr, cells_ptr, sort_keys_ptr,
                      n_query_keys, n_rows, n_images, n_keys, n_bits,
                      DIM: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Copies the keys of queries, and appends the keys along which points are traversed.

    Args:
        query_keys_ptr: ``[L * N]``.
        groups_ptr, cells_ptr: int32 ``[nnz]`` and ``[P, nnz]``, of the points.
        sort_keys_ptr: ``[L * N + nnz]``, the result.
        n_query_keys, n_rows, n_images: L * N, nnz and B.
        n_keys: the number from which the keys of points start.
        n_bits: bits per axis of the curve.
        BLOCK: keys of queries, and points, of a program.
    """
    key_dtype: tl.constexpr = sort_keys_ptr.dtype.element_ty
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    copied = index < n_query_keys  # [BLOCK]
    key = tl.load(query_keys_ptr + index, mask=copied, other=0)  # [BLOCK]
    tl.store(sort_keys_ptr + index, key, mask=copied)
    valid = index < n_rows  # [BLOCK]
    group = tl.maximum(tl.load(groups_ptr + index, mask=valid, other=0), 0)  # [BLOCK]
    group = (group % LEVELS) * n_images + group // LEVELS  # by level, then by image
    curve = (group.to(key_dtype) << (n_bits * DIM)) + n_keys.to(key_dtype)  # [BLOCK]
    for axis in tl.static_range(DIM):
        cell = tl.load(cells_ptr + axis * n_rows.to(tl.int64) + index, mask=valid, other=0)
        curve += spread_bits(cell, n_bits, DIM - 1 - axis, DIM, key_dtype)
    tl.store(sort_keys_ptr + n_query_keys.to(tl.int64) + index, curve, mask=valid)


@triton.jit(do_not_specialize=("n_first", "n_second", "period"))
def split_order(order_ptr, first_ptr, second_ptr, cells_ptr, columns_ptr,
                n_first, n_second, period, DIM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The order of two kinds of keys that were sorted together, the second after the first.

    Args:
        order_ptr: int64 ``[n_first + n_second]``.
        first_ptr: int32 ``[n_first]``, a result: indices modulo ``period``.
        second_ptr: int32 ``[n_second]``, a result: indices from the first of the second kind on.
        cells_ptr: int32 ``[DIM, n_first]``, or None.
        columns_ptr: int32 ``[n_first]``, a result: the last coordinate of the cells, in order.
        n_first, n_second: how many keys there are of either kind.
        DIM: number of spatial dimensions; 0 without cells.
        BLOCK: keys of each kind of a program.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = index < n_first  # [BLOCK]
    first = tl.load(order_ptr + index, mask=valid, other=0) - index // period * period  # [BLOCK]
    tl.store(first_ptr + index, first.to(tl.int32), mask=valid)
    if DIM > 0:
        valid = valid & (first >= 0) & (first < n_first)
        last_ptr = cells_ptr + (DIM - 1) * n_first.to(tl.int64)
        column = tl.load(last_ptr + first, mask=valid, other=0)  # [BLOCK]
        tl.store(columns_ptr + index, column, mask=valid)
    valid = index < n_second  # [BLOCK]
    second = tl.load(order_ptr + n_first.to(tl.int64) + index, mask=valid, other=0) - n_first
    tl.store(second_ptr + index, second.to(tl.int32), mask=valid)


@triton.jit
def search_start(keys_ptr, wanted, n_keys):
    """The first of the sorted keys that is not below ``wanted``, int32 ``[BLOCK]``; n_keys > 0.

    It lies within ``[start, start + span]``; all of the block have the same span. No key is read
    beyond the last one.
    """
    start = tl.zeros_like(wanted).to(tl.int32)  # [BLOCK]
    span, before_ptr = n_keys, keys_ptr - 1  # the address before the first key
    while span > 1:
        half = span // 2
        key = tl.load(before_ptr + (start + half))  # [BLOCK]
        start = tl.where(key < wanted, start + half, start)
        span -= half
    return start + (tl.load(keys_ptr + start) < wanted).to(tl.int32)


@triton.jit
def gallop_to_stop(keys_ptr, start, wanted, n_keys, width):
    """The first of the sorted keys from ``start`` on that is above ``wanted``, int32 ``[BLOCK]``.

    Without points that share a cell it is at most ``width`` away. Where it is farther for any of
    the block, all keys are searched.
    """
    left = n_keys - start  # [BLOCK]
    key = tl.load(keys_ptr + (start + tl.minimum(width, left - 1)))  # [BLOCK]
    beyond = (width < left) & (key <= wanted)  # [BLOCK]
    span = tl.where(tl.max(beyond.to(tl.int32), 0) > 0, n_keys, width)
    stop, before_ptr = start, keys_ptr - 1  # [BLOCK], and the address before the first key
    while span > 0:
        half = (span + 1) // 2
        # If the last key is not above ``wanted``, a step may go beyond all keys.
        key = tl.load(before_ptr + tl.minimum(stop + half, n_keys))  # [BLOCK]
        stop = tl.where(key <= wanted, stop + half, stop)
        span -= half
    return tl.minimum(stop, n_keys)


@triton.jit(do_not_specialize=("n_sorted", "n_key_rows", "n_rows", "n_total", "width"))
def find_slices(sorted_ptr, keys_ptr, groups_ptr, slots_ptr, starts_ptr, stops_ptr,
                n_sorted, n_key_rows, n_rows, n_total, width,
                SLOTS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The slices of windows among sorted keys. A program finds ``BLOCK`` of ``n_total`` slices.

    Args:
        sorted_ptr: ``[n_sorted]``, the sorted keys.
        keys_ptr: ``[S, n]``, the keys from which slices count; negative ones have no neighbors.
        groups_ptr: int32 ``[n]``, ``image * L + level``, which has the level whose slots a row
            has; None where all rows have the same slots.
        slots_ptr: ``[1 or L, SLOTS, 4]``, the slot table, in the dtype of keys.
        starts_ptr, stops_ptr: int32 ``[n, SLOTS]``, the results.
        n_key_rows, n_rows: S and n.
        n_total: ``n * SLOTS``.
        width: cells of the longest slice.
        SLOTS: slices of a row.
        LEVELS: L with ``groups_ptr``, else 1.
        BLOCK: slices of a program.
    """
    key_dtype: tl.constexpr = sorted_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    valid = first + lane < n_total  # [BLOCK]
    slot = (first % SLOTS).to(tl.int32) + lane  # [BLOCK]
    row = first // SLOTS + slot // SLOTS  # [BLOCK]
    slot = slot % SLOTS
    if LEVELS > 1:
        group = tl.load(groups_ptr + row, mask=valid, other=0)  # [BLOCK]
        slot += tl.where(group >= 0, group % LEVELS, 0) * SLOTS
    slot_ptr = slots_ptr + slot * SLOT_FIELDS  # [BLOCK]
    key_row = tl.load(slot_ptr + KEY_ROW).to(tl.int32)  # [BLOCK]
    has_key = valid & (key_row >= 0) & (key_row < n_key_rows)  # [BLOCK]
    key_offset = key_row.to(tl.int64) * n_rows + row  # [BLOCK]
    key = tl.load(keys_ptr + key_offset, mask=has_key, other=-1)  # [BLOCK]
    used = (tl.load(slot_ptr + IS_USED) != 0) & (key >= 0)  # [BLOCK]
    last = key + tl.load(slot_ptr + LAST_KEY).to(key_dtype)  # [BLOCK]
    key += tl.load(slot_ptr + FIRST_KEY).to(key_dtype)
    start = tl.zeros_like(lane)  # [BLOCK]
    stop = tl.zeros_like(lane)  # [BLOCK]
    if n_sorted > 0:
        start = search_start(sorted_ptr, key, n_sorted)
        stop = gallop_to_stop(sorted_ptr, start, tl.where(used, last, -1), n_sorted, width)
    tl.store(starts_ptr + first + lane, start, mask=valid)
    tl.store(stops_ptr + first + lane, stop, mask=valid)


@triton.jit
def _scan_stops(stop, stop_before, next_stop, next_stop_before):
    """Combines two ranges of slices: the largest stop, and the largest of all but the last."""
    return tl.maximum(stop, next_stop), tl.maximum(stop, next_stop_before)


@triton.jit
def _exchange(key, STRIDE: tl.constexpr):
    """Keys of `sort_keys`: the smaller of every two that are ``STRIDE`` apart comes first."""
    height: tl.constexpr = key.shape[0]
    width: tl.constexpr = key.shape[1]
    distance: tl.constexpr = STRIDE * width if height > STRIDE else STRIDE // height
    pairs = tl.reshape(key, (height * width // (2 * distance), 2, distance))
    other = pairs ^ tl.xor_sum(pairs, 1, keep_dims=True)  # of each pair
    is_second = tl.arange(0, 2)[None, :, None] == 1  # [1, 2, 1]
    pairs = tl.where((pairs > other) != is_second, other, pairs)
    return tl.reshape(pairs, (height, width))


@triton.jit
def sort_keys(key, BITS: tl.constexpr):
    """Integers ``[height, width]``, ``2^BITS`` in all, sorted column after column.

    A bitonic network, as `triton.language.sort` is. That has no loop, and takes long to compile;
    and here a column is in the registers of a thread, so that most pairs are as well.
    """
    height: tl.constexpr = key.shape[0]
    width: tl.constexpr = key.shape[1]
    position = tl.arange(0, height)[:, None] + height * tl.arange(0, width)[None, :]
    key ^= -(position & 1)
    turns = position ^ (position >> 1)  # [height, width]
    for stage in range(1, BITS + 1):
        # Blocks of 2^stage keys ascend and descend in turns; where they descend, the complements
        # of keys ascend.
        key ^= (turns << (32 - stage)) >> 31
        for i in tl.static_range(BITS):
            if stage >= BITS - i:
                key = _exchange(key, 1 << (BITS - 1 - i))
    return key


@triton.jit
def stops_before(stop):
    """The largest stop before each of ``[height, width]``, column after column; first -1."""
    _, before = tl.associative_scan((stop, tl.full(stop.shape, -1, tl.int32)), 0, _scan_stops)
    most = tl.max(stop, 0)  # [width]
    _, most_before = tl.associative_scan((most, tl.full(most.shape, -1, tl.int32)), 0, _scan_stops)
    return tl.maximum(before, most_before[None, :])


@triton.jit
def sums_before(x):
    """The sum of all before each of ``[height, width]``, column after column; and that of all."""
    total = tl.sum(x, 0)  # [width]
    before = tl.cumsum(total, 0) - total  # [width]
    return tl.cumsum(x, 0) - x + before[None, :], tl.sum(total, 0)


@triton.jit
def join_slices(traversal_ptr, starts_ptr, stops_ptr, firsts_ptr, shifts_ptr, counts_ptr,
                tile, n_rows, n_slices, n_levels, level, first_slice,
                LEVEL_SLICES: tl.constexpr, ROWS: tl.constexpr, ROW_BITS: tl.constexpr,
                BITS: tl.constexpr, IS_LONG: tl.constexpr):  # fmt: skip
    """The runs of one tile at one level, see `find_runs`.

    Args:
        tile: int64, the tile.
        n_levels: S.
        first_slice: the number of a row's slices at the levels before ``level``.
        LEVEL_SLICES: the number of a row's slices at this level.
        ROW_BITS, BITS, IS_LONG: see `find_runs`.
    """
    width: tl.constexpr = WARP if WARP < (1 << BITS) else 1 << BITS
    height: tl.constexpr = (1 << BITS) // width
    slot_bits: tl.constexpr = BITS - ROW_BITS
    own_row = tl.arange(0, 1 << ROW_BITS)  # [padded_rows]
    valid = (own_row < ROWS) & (tile * ROWS + own_row < n_rows)  # [padded_rows]
    row = tl.load(traversal_ptr + tile * ROWS + own_row, mask=valid, other=-1)  # [padded_rows]
    valid = (row >= 0) & (row < n_rows)
    slot = tl.arange(0, 1 << slot_bits)[None, :]  # [1, padded_slots]
    offset = (row.to(tl.int64) * n_slices + first_slice)[:, None] + slot
    valid = valid[:, None] & (slot < LEVEL_SLICES)
    start = tl.load(starts_ptr + offset, mask=valid, other=0)  # [padded_rows, padded_slots]
    stop = tl.load(stops_ptr + offset, mask=valid, other=0)
    # Sort by start, empty slices last. The low bits tell the slice's row and slot.
    largest: tl.constexpr = LARGEST if IS_LONG else LARGEST_INT32
    key = start.to(tl.int64) << BITS if IS_LONG else start << BITS
    key |= (own_row << slot_bits)[:, None] | slot
    key = tl.reshape(tl.where(stop > start, key, largest), (height, width))
    key = sort_keys(key, BITS)  # [height, width], and all that follow
    nonempty = key != largest
    start = tl.where(nonempty, key >> BITS, 0).to(tl.int32)
    index = key.to(tl.int32) & ((1 << BITS) - 1)
    own_row_ptr = traversal_ptr + tile * ROWS + (index >> slot_bits)
    row = tl.load(own_row_ptr, mask=nonempty, other=0).to(tl.int64)
    offset = row * n_slices + first_slice + (index & ((1 << slot_bits) - 1))
    stop = tl.load(stops_ptr + offset, mask=nonempty, other=0)
    # A slice that starts beyond all stops of those before it starts a run.
    stop_before = stops_before(stop)
    starts_run = nonempty & (start > stop_before)
    n_new = tl.where(nonempty, tl.maximum(stop - tl.maximum(start, stop_before), 0), 0)
    first, n_entries = sums_before(n_new)
    run_index, n_runs = sums_before(starts_run.to(tl.int32))
    run_offset = (tile * n_slices + first_slice) * ROWS + run_index
    tl.store(firsts_ptr + run_offset, first, mask=starts_run)
    tl.store(shifts_ptr + run_offset, start - first, mask=starts_run)
    level_counts_ptr = counts_ptr + (tile * n_levels + level) * 2
    tl.store(level_counts_ptr, n_runs)
    tl.store(level_counts_ptr + 1, n_entries)


@triton.jit(do_not_specialize=("n_rows", "n_slices"))
def find_runs(traversal_ptr, starts_ptr, stops_ptr, firsts_ptr, shifts_ptr, counts_ptr,
              n_rows, n_slices, SLICES: tl.constexpr, BITS: tl.constexpr,
              LEVELS: tl.constexpr, ROWS: tl.constexpr, ROW_BITS: tl.constexpr,
              IS_LONG: tl.constexpr):  # fmt: skip
    """See `reference.find_runs`. A program joins the slices of one tile at one level.

    Args:
        traversal_ptr: int32 ``[n]``.
        starts_ptr, stops_ptr: int32 ``[n, R]``.
        firsts_ptr, shifts_ptr: int32 ``[T, ROWS * R]``, results.
        counts_ptr: int32 ``[T, S, 2]``, the third result.
        n_rows, n_slices: n and R.
        SLICES: for each of the S levels the number of a row's slices before it, and R at the end.
        BITS: for each level, those of a slice's index in the tile: of its row, and of its slot.
        LEVELS: S.
        ROWS: rows of a tile.
        ROW_BITS: bits of a row's index in its tile.
        IS_LONG: whether int32 does not hold a start and the index of a slice in its tile.
    """
    tile = (tl.program_id(0) // LEVELS).to(tl.int64)
    for level in tl.static_range(LEVELS):
        if tl.program_id(0) % LEVELS == level:
            join_slices(
                traversal_ptr, starts_ptr, stops_ptr, firsts_ptr, shifts_ptr, counts_ptr,
                tile, n_rows, n_slices, LEVELS, level, SLICES[level],
                SLICES[level + 1] - SLICES[level], ROWS, ROW_BITS, BITS[level], IS_LONG,
            )  # fmt: skip
