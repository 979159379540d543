"""Deformable sampling in Triton: sums of rows of a table, interpolated between centers of cells.

A *bag* is one head of one query: L * K locations, whose rows are summed. Bags and locations are
numbered in the order of the tensor of locations, ``[N, H, L, K, P]``. A location's corners, the
``2 ** P`` cells around it, are found in the hash table of `_index.cell_hash`. The threads of one
location look it up each for a corner, at the same addresses, so that any number of dimensions takes
one loop.

The gradient of the table is summed without atomics, in the order of locations. They are sorted by
*segment*, the entry of the hash table and the head; a row of the table adds up the segments of the
entries that have its cell as a corner, at most one for each corner.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# 2^64 divided by the golden ratio, as a signed integer, as in `_index.cell_hash`.
MULTIPLIER = tl.constexpr(-7046029254386353131)
FARTHEST = tl.constexpr(2.0**62)  # cells from the map's first one; all beyond the map are empty
BEYOND = tl.constexpr(-2.0)  # a cell before the map, with no neighbor in it


class Index(NamedTuple):
    """The hash table, see `_index.cell_hash.CellIndex`."""

    origins: Any  # int64 [B, L]
    steps: Any  # int64 [P, L]
    sizes: Any  # int64 [L, P], of the levels
    starts: Any  # int32 [buckets]
    keys: Any  # int64 [E]
    corners: Any  # int32 [E, 2 ** P]


@triton.jit
def split_coordinate(locations_ptr, location, valid, axis: tl.constexpr, AXES: tl.constexpr):
    """Of some locations ``[n]`` the first corner along an axis, and their distance from it."""
    x = tl.load(locations_ptr + location * AXES + axis, mask=valid, other=0.0) - 0.5  # [n]
    first = tl.floor(x)  # [n]
    return first, x - first


@triton.jit
def find_cell(first, size, IS_PERIODIC: tl.constexpr):
    """The cells ``first`` ``[n]``, whole numbers, as int64, along an axis of ``size`` ``[n]``.

    NaN is outside the map, also of a periodic axis, and so is what is further than `FARTHEST`.
    """
    if IS_PERIODIC:
        is_near = tl.abs(first) <= FARTHEST  # [n], not NaN either
        cell = tl.where(is_near, first, 0.0).to(tl.int64) % tl.maximum(size, 1)  # [n]
        cell = tl.where(cell < 0, cell + size, cell)
        return tl.where(is_near, cell, -2)
    else:
        first = tl.where(first >= BEYOND, tl.minimum(first, FARTHEST), BEYOND)
        return tl.minimum(first.to(tl.int64), size)


@triton.jit
def find_bucket(key, shift, n_buckets):
    """The buckets of keys ``[n]``; ``n_buckets`` is ``2 ** (64 - shift)``, or 1."""
    return (key * MULTIPLIER >> shift) & (n_buckets - 1)


@triton.jit
def find_entries(index, images_ptr, locations_ptr, location, valid, n_images, n_entries, n_buckets,
                 shift, HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
                 AXES: tl.constexpr, PERIODIC: tl.constexpr):  # fmt: skip
    """Looks locations ``[n]``, int64, up in the hash table.

    Returns:
        The entry of each, -1 where all corners are empty, and the group of its empty corners, by
        image and level; int64 ``[n]`` each.
    """
    level = location // POINTS % LEVELS  # [n]
    query = location // (HEADS * LEVELS * POINTS)  # [n]
    image = tl.load(images_ptr + query, mask=valid, other=0)  # [n]
    image = tl.minimum(tl.maximum(image, 0), n_images - 1)
    group = image * LEVELS + level  # [n]
    key = tl.load(index.origins + group, mask=valid, other=0)  # [n]
    for axis in tl.static_range(AXES):
        first, _ = split_coordinate(locations_ptr, location, valid, axis, AXES)  # [n]
        size = tl.load(index.sizes + level * AXES + axis, mask=valid, other=1)  # [n]
        step = tl.load(index.steps + axis * LEVELS + level, mask=valid, other=0)  # [n]
        key += find_cell(first, size, (PERIODIC >> axis) % 2 == 1) * step
    bucket = find_bucket(key, shift, n_buckets)  # [n]
    entry = tl.load(index.starts + bucket, mask=valid, other=-1).to(tl.int64)  # [n]
    found = tl.full(location.shape, -1, tl.int64)  # [n]
    active = valid & (entry >= 0) & (entry < n_entries)  # [n]
    while tl.max(active.to(tl.int32), 0) > 0:
        candidate = tl.load(index.keys + entry, mask=active, other=0)  # [n]
        found = tl.where(active & (candidate == key), entry, found)
        active &= (candidate != key) & (find_bucket(candidate, shift, n_buckets) == bucket)
        entry += 1
        active &= entry < n_entries
    return found, group


@triton.jit
def find_rows(index, entry, group, corner, valid, n_cells,
              AXES: tl.constexpr, HAS_BACKGROUND: tl.constexpr):  # fmt: skip
    """The rows of the table, int64 ``[n]``, that locations have at corners ``[n]``.

    Returns:
        The rows, which of them exist, and which corners are occupied.
    """
    mask = valid & (entry >= 0)  # [n]
    ptrs = index.corners + entry * (1 << AXES) + corner  # [n]
    cell = tl.load(ptrs, mask=mask, other=-1).to(tl.int64)  # [n]
    occupied = (cell >= 0) & (cell < n_cells)  # [n]
    if HAS_BACKGROUND:
        return tl.where(occupied, cell, n_cells + group), valid, occupied
    else:
        return cell, occupied, occupied


@triton.jit
def corner_factors(locations_ptr, location, valid, corner, dtype: tl.constexpr,
                   AXES: tl.constexpr, SLOPE: tl.constexpr):  # fmt: skip
    """The interpolation weights of corners ``[n]``, or their derivatives along the axis ``SLOPE``.

    Corners are numbered row-major.
    """
    factor = tl.full(location.shape, 1.0, dtype)  # [n]
    for axis in tl.static_range(AXES):
        is_upper = (corner >> (AXES - 1 - axis)) % 2 == 1  # [n]
        if axis == SLOPE:
            factor = tl.where(is_upper, factor, -factor)
        else:
            _, fraction = split_coordinate(locations_ptr, location, valid, axis, AXES)  # [n]
            fraction = fraction.to(dtype)
            factor *= tl.where(is_upper, fraction, 1.0 - fraction)
    return factor


@triton.jit
def load_channels(ptr, row, valid, first, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """``[n, CHANNELS]``: channels from ``first`` on of rows ``[n]`` of ``WIDTH``, zero in the
    padding and in rows that are not ``valid``.
    """
    channel = first + tl.arange(0, CHANNELS)[None, :]  # [1, CHANNELS]
    mask = valid[:, None] & (channel < WIDTH)  # [n, CHANNELS]
    return tl.load(ptr + row[:, None] * WIDTH + channel, mask=mask, other=0.0)


@triton.jit(do_not_specialize=("n_bags", "n_images", "n_cells", "n_entries", "n_buckets", "shift"))
def sample(index, table_ptr, locations_ptr, weights_ptr, images_ptr, out_ptr,
           n_bags, n_images, n_cells, n_entries, n_buckets, shift,
           HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr, AXES: tl.constexpr,
           PERIODIC: tl.constexpr, HAS_BACKGROUND: tl.constexpr, WIDTH: tl.constexpr,
           CHANNELS: tl.constexpr, BAGS: tl.constexpr, TERMS: tl.constexpr):  # fmt: skip
    """See `_index.sampling.sample`. A program takes some channels of a block of bags.

    Args:
        index: the `Index`.
        table_ptr: ``[rows, H, d]``, those of cells, then, with a background, those of empty cells.
        locations_ptr: ``[N, H, L, K, P]``.
        weights_ptr: ``[N, H, L, K]``.
        images_ptr: int64 ``[N]``.
        out_ptr: ``[N, H, d]``, the result.
        n_bags, n_images, n_cells, n_entries: N * H, B, M, and entries of the hash table.
        n_buckets, shift: see `find_bucket`.
        HEADS, LEVELS, POINTS, AXES, WIDTH: H, L, K, P and d.
        PERIODIC: bit i is set if axis i is periodic.
        HAS_BACKGROUND: whether the table has rows of empty cells.
        CHANNELS: channels of a program.
        BAGS, TERMS: bags of a program, and how many corners of each it takes at once.
    """
    dtype: tl.constexpr = table_ptr.dtype.element_ty
    parts: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    n_terms: tl.constexpr = LEVELS * POINTS * (1 << AXES)
    first_bag = (tl.program_id(0) // parts).to(tl.int64) * BAGS
    first_channel = tl.program_id(0) % parts * CHANNELS
    lane = tl.arange(0, BAGS * TERMS)  # [n], for n = BAGS * TERMS
    bag = first_bag + lane // TERMS  # [n]
    acc = tl.zeros([BAGS, CHANNELS], dtype)
    for first in range(0, n_terms, TERMS):
        term = first + lane % TERMS  # [n]
        corner = term % (1 << AXES)  # [n]
        valid = (bag < n_bags) & (term < n_terms)  # [n]
        location = bag * (LEVELS * POINTS) + term // (1 << AXES)  # [n]
        entry, group = find_entries(
            index, images_ptr, locations_ptr, location, valid, n_images, n_entries, n_buckets,
            shift, HEADS, LEVELS, POINTS, AXES, PERIODIC,
        )  # [n] each  # fmt: skip
        row, has_row, _ = find_rows(
            index, entry, group, corner, valid, n_cells, AXES, HAS_BACKGROUND
        )  # [n] each
        values = load_channels(
            table_ptr, row * HEADS + bag % HEADS, has_row, first_channel, WIDTH, CHANNELS
        )  # [n, CHANNELS]
        factor = corner_factors(locations_ptr, location, valid, corner, dtype, AXES, -1)  # [n]
        factor *= tl.load(weights_ptr + location, mask=valid, other=0.0)
        # NaN where a factor is, also beside a row of zeros.
        acc += tl.sum(tl.reshape(factor[:, None] * values, (BAGS, TERMS, CHANNELS)), 1)
    own = first_bag + tl.arange(0, BAGS)[:, None]  # [BAGS, 1]
    channel = first_channel + tl.arange(0, CHANNELS)[None, :]  # [1, CHANNELS]
    tl.store(out_ptr + own * WIDTH + channel, acc, mask=(own < n_bags) & (channel < WIDTH))


@triton.jit(do_not_specialize=("n_locations", "n_images", "n_cells", "n_entries", "n_buckets",
                               "shift"))  # fmt: skip
def location_gradients(index, table_ptr, locations_ptr, weights_ptr, images_ptr, grad_out_ptr,
                       grad_locations_ptr, grad_weights_ptr, segments_ptr, empty_ptr,
                       n_locations, n_images, n_cells, n_entries, n_buckets, shift,
                       HEADS: tl.constexpr, LEVELS: tl.constexpr, POINTS: tl.constexpr,
                       AXES: tl.constexpr, PERIODIC: tl.constexpr, HAS_BACKGROUND: tl.constexpr,
                       WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PADDED_AXES: tl.constexpr,
                       LOCATIONS: tl.constexpr, CORNERS: tl.constexpr):  # fmt: skip
    """The gradients of locations and their weights, and the segment of each location.

    Args:
        index, table_ptr, locations_ptr, weights_ptr, images_ptr, n_images, n_cells, n_entries,
            n_buckets, shift, HEADS, LEVELS, POINTS, AXES, PERIODIC, HAS_BACKGROUND, WIDTH: see
            `sample`.
        grad_out_ptr: ``[N, H, d]``.
        grad_locations_ptr, grad_weights_ptr: results, shaped as what they are gradients of.
        segments_ptr: integer ``[N, H, L, K]``, a result: ``entry * H + head``, ``E * H`` where all
            corners are empty.
        empty_ptr: ``[N, H, L, K]``, a result, the sum of the factors of empty corners; None without
            a background.
        n_locations: N * H * L * K.
        CHANNELS: channels at a time.
        PADDED_AXES: P or more, a power of two.
        LOCATIONS, CORNERS: locations of a program, and corners that it takes at once.
    """
    dtype: tl.constexpr = table_ptr.dtype.element_ty
    lane = tl.arange(0, LOCATIONS * CORNERS)  # [n], for n = LOCATIONS * CORNERS
    first_location = tl.program_id(0).to(tl.int64) * LOCATIONS
    location = first_location + lane // CORNERS  # [n]
    valid = location < n_locations  # [n]
    bag = location // (LEVELS * POINTS)  # [n]
    head = bag % HEADS  # [n]
    entry, group = find_entries(
        index, images_ptr, locations_ptr, location, valid, n_images, n_entries, n_buckets, shift,
        HEADS, LEVELS, POINTS, AXES, PERIODIC,
    )  # [n] each  # fmt: skip
    segment = tl.where(entry >= 0, entry * HEADS + head, n_entries.to(tl.int64) * HEADS)  # [n]
    segment = segment.to(segments_ptr.dtype.element_ty)
    tl.store(segments_ptr + location, segment, mask=valid & (lane % CORNERS == 0))

    own = first_location + tl.arange(0, LOCATIONS)  # [LOCATIONS]
    own_valid = own < n_locations  # [LOCATIONS]
    weight = tl.load(weights_ptr + own, mask=own_valid, other=0.0)  # [LOCATIONS]
    axes = tl.arange(0, PADDED_AXES)[None, :]  # [1, PADDED_AXES]
    grad_weight = tl.zeros([LOCATIONS], dtype)
    empty = tl.zeros([LOCATIONS], dtype)
    grad_location = tl.zeros([LOCATIONS, PADDED_AXES], dtype)
    for first in range(0, 1 << AXES, CORNERS):
        corner = first + lane % CORNERS  # [n]
        row, has_row, occupied = find_rows(
            index, entry, group, corner, valid, n_cells, AXES, HAS_BACKGROUND
        )  # [n] each
        dots = tl.zeros([LOCATIONS * CORNERS], dtype)  # [n]
        for first_channel in range(0, WIDTH, CHANNELS):
            values = load_channels(
                table_ptr, row * HEADS + head, has_row, first_channel, WIDTH, CHANNELS
            )  # [n, CHANNELS]
            grad_out = load_channels(
                grad_out_ptr, bag, has_row, first_channel, WIDTH, CHANNELS
            )  # [n, CHANNELS]
            dots += tl.sum(values * grad_out, 1)
        factor = corner_factors(locations_ptr, location, valid, corner, dtype, AXES, -1)  # [n]
        grad_weight += tl.sum(tl.reshape(factor * dots, (LOCATIONS, CORNERS)), 1)
        if HAS_BACKGROUND:
            of_empty = tl.where(occupied, 0.0, factor)  # [n]
            empty += tl.sum(tl.reshape(of_empty, (LOCATIONS, CORNERS)), 1)
        for axis in tl.static_range(AXES):
            slope = corner_factors(locations_ptr, location, valid, corner, dtype, AXES, axis)  # [n]
            grad = tl.sum(tl.reshape(slope * dots, (LOCATIONS, CORNERS)), 1)  # [LOCATIONS]
            grad_location += tl.where(axes == axis, grad[:, None], 0.0)
    tl.store(grad_weights_ptr + own, grad_weight, mask=own_valid)
    if HAS_BACKGROUND:
        tl.store(empty_ptr + own, empty * weight, mask=own_valid)
    ptrs = grad_locations_ptr + own[:, None] * AXES + axes  # [LOCATIONS, PADDED_AXES]
    grad_location = (grad_location * weight[:, None]).to(grad_locations_ptr.dtype.element_ty)
    tl.store(ptrs, grad_location, mask=own_valid[:, None] & (axes < AXES))


@triton.jit(do_not_specialize=("n_locations", "n_segments"))
def find_bounds(segments_ptr, starts_ptr, stops_ptr, n_locations, n_segments,
                BLOCK: tl.constexpr):  # fmt: skip
    """Where the locations of each segment begin and end. A program takes a block of them.

    Args:
        segments_ptr: integer ``[N * H * L * K]``, sorted.
        starts_ptr, stops_ptr: integer ``[n_segments]``, the results, written where a segment has
            locations.
        n_locations: N * H * L * K.
        n_segments: those from this one on have no bounds.
        BLOCK: locations of a program.
    """
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = position < n_locations  # [BLOCK]
    own = tl.load(segments_ptr + position, mask=valid, other=0)  # [BLOCK]
    last = tl.load(segments_ptr + position - 1, mask=valid & (position > 0), other=-1)  # [BLOCK]
    begins = valid & (own != last)  # [BLOCK]
    dtype: tl.constexpr = starts_ptr.dtype.element_ty
    tl.store(starts_ptr + own, position.to(dtype), mask=begins & (own < n_segments))
    tl.store(stops_ptr + last, position.to(dtype), mask=begins & (last >= 0))
    is_last = (position == n_locations - 1) & (own < n_segments)  # [BLOCK]
    tl.store(stops_ptr + own, (position + 1).to(dtype), mask=is_last)


@triton.jit(do_not_specialize=("n_entries", "n_cells"))
def find_entries_of_cells(corners_ptr, entries_ptr, n_entries, n_cells,
                          CORNERS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Which entry has a cell as each corner. A program takes a block of corners of entries.

    Args:
        corners_ptr: int32 ``[E, CORNERS]``, see `Index`.
        entries_ptr: int32 ``[M, CORNERS]``, the result, written where there is one.
        n_entries, n_cells: E and M.
        CORNERS: of an entry.
        BLOCK: corners of a program.
    """
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = offset < n_entries.to(tl.int64) * CORNERS  # [BLOCK]
    cell = tl.load(corners_ptr + offset, mask=valid, other=-1).to(tl.int64)  # [BLOCK]
    ptrs = entries_ptr + cell * CORNERS + offset % CORNERS  # [BLOCK]
    mask = (cell >= 0) & (cell < n_cells)  # [BLOCK]
    tl.store(ptrs, (offset // CORNERS).to(tl.int32), mask=mask)


@triton.jit(do_not_specialize=("n_cells",))
def table_gradients(locations_ptr, weights_ptr, grad_out_ptr, order_ptr, starts_ptr, stops_ptr,
                    entries_ptr, grad_table_ptr, n_cells,
                    HEADS: tl.constexpr, PER_BAG: tl.constexpr, AXES: tl.constexpr,
                    WIDTH: tl.constexpr, CHANNELS: tl.constexpr, CORNERS: tl.constexpr,
                    TERMS: tl.constexpr):  # fmt: skip
    """The gradient of the table. A program takes some channels of a head of one row.

    Args:
        locations_ptr, weights_ptr, grad_out_ptr: see `location_gradients`.
        order_ptr: int64 ``[N * H * L * K]``, the locations, segment by segment.
        starts_ptr, stops_ptr: see `find_bounds`.
        entries_ptr: int32 ``[M, 2 ** P]``, see `find_entries_of_cells`; -1 where there is none.
        grad_table_ptr: ``[M, H, d]``, the result.
        n_cells: M.
        HEADS, PER_BAG, AXES, WIDTH: H, L * K, P and d.
        CHANNELS: channels of a program.
        CORNERS: corners taken at once.
        TERMS: locations taken at once.
    """
    dtype: tl.constexpr = grad_table_ptr.dtype.element_ty
    parts: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    first_channel = tl.program_id(0) % parts * CHANNELS
    head = tl.program_id(0) // parts % HEADS
    # Backwards: the cells of coarse levels, which are sampled most often, are the last ones.
    cell = n_cells - 1 - (tl.program_id(0) // (parts * HEADS)).to(tl.int64)
    corner = tl.arange(0, CORNERS)  # [CORNERS]
    acc = tl.zeros([CHANNELS], dtype)
    for first_corner in range(0, 1 << AXES, CORNERS):
        entry = tl.load(entries_ptr + cell * (1 << AXES) + first_corner + corner)  # [CORNERS]
        segment = entry.to(tl.int64) * HEADS + head  # [CORNERS]
        start = tl.load(starts_ptr + segment, mask=entry >= 0, other=0).to(tl.int64)  # [CORNERS]
        stop = tl.load(stops_ptr + segment, mask=entry >= 0, other=0).to(tl.int64)  # [CORNERS]
        # The segments of all corners as one list, whose first `ends[c]` are those up to corner c.
        ends = tl.cumsum(stop - start, 0)  # [CORNERS]
        for first in range(0, tl.sum(stop - start, 0), TERMS):
            term = first + tl.arange(0, TERMS)  # [TERMS]
            own = tl.sum((ends[None, :] <= term[:, None]).to(tl.int32), 1)  # [TERMS], its corner
            valid = own < CORNERS  # [TERMS]
            is_own = own[:, None] == corner[None, :]  # [TERMS, CORNERS]
            position = term + tl.sum(tl.where(is_own, (stop - ends)[None, :], 0), 1)  # [TERMS]
            location = tl.load(order_ptr + position, mask=valid, other=0)  # [TERMS]
            factor = corner_factors(
                locations_ptr, location, valid, first_corner + own, dtype, AXES, -1
            )  # [TERMS]
            factor *= tl.load(weights_ptr + location, mask=valid, other=0.0)
            grad_out = load_channels(
                grad_out_ptr, location // PER_BAG, valid, first_channel, WIDTH, CHANNELS
            )  # [TERMS, CHANNELS]
            acc += tl.sum(factor[:, None] * grad_out, 0)
    channel = first_channel + tl.arange(0, CHANNELS)  # [CHANNELS]
    ptrs = grad_table_ptr + (cell * HEADS + head) * WIDTH + channel  # [CHANNELS]
    tl.store(ptrs, acc, mask=channel < WIDTH)
