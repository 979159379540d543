"""Planning in Triton: the slices of every query's windows, and the runs of every tile."""

import triton
import triton.language as tl

LARGEST = tl.constexpr(2**63 - 1)
LOW_32_BITS = tl.constexpr(2**32 - 1)


@triton.jit
def search_sorted(keys_ptr, wanted, n_keys, n_steps, RIGHT: tl.constexpr):
    """`torch.searchsorted` of ``wanted`` ``[BLOCK]`` among sorted keys, int64 ``[BLOCK]``."""
    low = tl.zeros_like(wanted)  # [BLOCK]
    high = low + n_keys  # [BLOCK]
    for _ in range(n_steps):
        middle = (low + high) // 2  # [BLOCK]
        key = tl.load(keys_ptr + middle, mask=middle < high, other=LARGEST)  # [BLOCK]
        below = (key <= wanted) if RIGHT else (key < wanted)  # [BLOCK]
        below = below & (middle < high)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=("n_keys", "n_steps", "n_queries", "n_slices", "n_total"))
def find_slices(keys_ptr, centers_ptr, level_ptr, offset_ptr, radius_ptr, starts_ptr, stops_ptr,
                n_keys, n_steps, n_queries, n_slices, n_total, BLOCK: tl.constexpr):  # fmt: skip
    """See `reference.find_slices`. A program finds ``BLOCK`` of the ``n_total`` slices.

    Args:
        keys_ptr: int64 ``[nnz]``, sorted.
        centers_ptr: int64 ``[L, N]``.
        level_ptr, offset_ptr, radius_ptr: int64 ``[R]``.
        starts_ptr, stops_ptr: int32 ``[N, R]``, the results.
        n_keys, n_queries, n_slices: nnz, N and R.
        n_steps: of a binary search.
        n_total: ``N * R``.
        BLOCK: slices of a program.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = index < n_total  # [BLOCK]
    query, slice_index = index // n_slices, index % n_slices  # [BLOCK]
    level = tl.load(level_ptr + slice_index, mask=valid, other=0)  # [BLOCK]
    middle = tl.load(centers_ptr + level * n_queries + query, mask=valid, other=0)  # [BLOCK]
    middle += tl.load(offset_ptr + slice_index, mask=valid, other=0)
    radius = tl.load(radius_ptr + slice_index, mask=valid, other=0)  # [BLOCK]
    start = search_sorted(keys_ptr, middle - radius, n_keys, n_steps, False)  # [BLOCK]
    stop = search_sorted(keys_ptr, middle + radius, n_keys, n_steps, True)  # [BLOCK]
    tl.store(starts_ptr + index, start.to(tl.int32), mask=valid)
    tl.store(stops_ptr + index, tl.maximum(start, stop).to(tl.int32), mask=valid)


@triton.jit
def _scan_stops(stop, stop_before, next_stop, next_stop_before):
    """Combines two ranges of slices: the largest stop, and the largest of all but the last."""
    return tl.maximum(stop, next_stop), tl.maximum(stop, next_stop_before)


@triton.jit(do_not_specialize=("n_rows", "n_slices", "n_levels", "level", "first_slice"))
def find_runs(traversal_ptr, starts_ptr, stops_ptr, firsts_ptr, shifts_ptr, counts_ptr,
              n_rows, n_slices, n_levels, level, first_slice,
              LEVEL_SLICES: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """See `reference.find_runs`. A program joins the slices of one tile at one level.

    Args:
        traversal_ptr: int32 ``[n]``.
        starts_ptr, stops_ptr: int32 ``[n, R]``.
        firsts_ptr, shifts_ptr: int32 ``[T, ROWS * R]``, results.
        counts_ptr: int32 ``[T, S, 2]``, the third result.
        n_rows, n_slices, n_levels: n, R and S.
        level: which of the S levels.
        first_slice: the number of a row's slices at the levels before.
        LEVEL_SLICES: the number of a row's slices at this level.
        ROWS: rows of a tile.
        PADDED: ``ROWS * LEVEL_SLICES`` or more, a power of two.
    """
    tile, index = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED)  # scalar, [PADDED]
    row_offset = tile * ROWS + index // LEVEL_SLICES  # [PADDED]
    valid = (index < ROWS * LEVEL_SLICES) & (row_offset < n_rows)  # [PADDED]
    row = tl.load(traversal_ptr + row_offset, mask=valid, other=0).to(tl.int64)  # [PADDED]
    slice_offset = row * n_slices + first_slice + index % LEVEL_SLICES  # [PADDED]
    start = tl.load(starts_ptr + slice_offset, mask=valid, other=0).to(tl.int64)  # [PADDED]
    stop = tl.load(stops_ptr + slice_offset, mask=valid, other=0).to(tl.int64)  # [PADDED]
    # Sort by start, empty slices last. The low 32 bits carry the stop along.
    packed = tl.sort(tl.where(stop > start, (start << 32) | stop, LARGEST))  # [PADDED]
    nonempty = packed != LARGEST  # [PADDED]
    start = tl.where(nonempty, packed >> 32, 0).to(tl.int32)
    stop = tl.where(nonempty, packed & LOW_32_BITS, 0).to(tl.int32)
    # The largest stop of the slices before each: a slice that starts beyond it starts a run.
    no_stop = tl.full([PADDED], -1, tl.int32)  # [PADDED]
    _, stop_before = tl.associative_scan((stop, no_stop), 0, _scan_stops)  # [PADDED]
    starts_run = nonempty & (start > stop_before)  # [PADDED]
    n_new = tl.where(nonempty, tl.maximum(stop - tl.maximum(start, stop_before), 0), 0)  # [PADDED]
    first = tl.cumsum(n_new, 0) - n_new  # [PADDED]
    run_index = tl.cumsum(starts_run.to(tl.int32), 0) - 1  # [PADDED]
    run_offset = (tile * n_slices + first_slice) * ROWS + run_index  # [PADDED]
    tl.store(firsts_ptr + run_offset, first, mask=starts_run)
    tl.store(shifts_ptr + run_offset, start - first, mask=starts_run)
    level_counts_ptr = counts_ptr + (tile * n_levels + level) * 2
    tl.store(level_counts_ptr, tl.sum(starts_run.to(tl.int32), 0))
    tl.store(level_counts_ptr + 1, tl.sum(n_new, 0))
