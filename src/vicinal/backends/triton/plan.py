"""The plan in Triton: where the rows of windows begin and end, and what tiles see as runs."""

import triton
import triton.language as tl

LARGEST = tl.constexpr(2**63 - 1)
LOW_32_BITS = tl.constexpr(2**32 - 1)


@triton.jit
def bound(keys, wanted, n_keys, n_steps, AFTER: tl.constexpr):
    """Where ``wanted`` would stand among the sorted ``keys``, before its equals or after them."""
    low = tl.zeros_like(wanted)
    high = low + n_keys
    for _ in range(n_steps):
        middle = (low + high) // 2
        key = tl.load(keys + middle, mask=middle < high, other=LARGEST)
        below = (key <= wanted) if AFTER else (key < wanted)
        below = below & (middle < high)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=("n_keys", "n_steps", "n_queries", "n_slices", "n_places"))
def find_slices(keys, centers, level, offset, radius, starts, stops, n_keys, n_steps, n_queries,
                n_slices, n_places, BLOCK: tl.constexpr):  # fmt: skip
    """See `reference.find_slices`; an element of the results for each place of a block."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < n_places
    query, number = place // n_slices, place % n_slices
    row = tl.load(level + number, mask=exists, other=0)
    middle = tl.load(centers + row * n_queries + query, mask=exists, other=0)
    middle += tl.load(offset + number, mask=exists, other=0)
    reach = tl.load(radius + number, mask=exists, other=0)
    start = bound(keys, middle - reach, n_keys, n_steps, False)
    stop = bound(keys, middle + reach, n_keys, n_steps, True)
    tl.store(starts + place, start.to(tl.int32), mask=exists)
    tl.store(stops + place, tl.maximum(start, stop).to(tl.int32), mask=exists)


@triton.jit
def _join(stop, before, other_stop, other_before):
    """The largest stop of all slices so far, and that of all but the last."""
    return tl.maximum(stop, other_stop), tl.maximum(stop, other_before)


@triton.jit(do_not_specialize=("n_rows", "n_slices", "n_levels", "level", "before"))
def find_runs(traversal, starts, stops, firsts, shifts, counts, n_rows, n_slices, n_levels,
              level, before, OWN: tl.constexpr, ROWS: tl.constexpr,
              SLOTS: tl.constexpr):  # fmt: skip
    """See `reference.find_runs`; a tile at a level, which has ``OWN`` slices of a row's, with
    ``before`` in front of them.
    """
    tile, slot = tl.program_id(0).to(tl.int64), tl.arange(0, SLOTS)
    place = tile * ROWS + slot // OWN
    exists = (slot < ROWS * OWN) & (place < n_rows)
    row = tl.load(traversal + place, mask=exists, other=0).to(tl.int64)
    edge = row * n_slices + before + slot % OWN
    start = tl.load(starts + edge, mask=exists, other=0).to(tl.int64)
    stop = tl.load(stops + edge, mask=exists, other=0).to(tl.int64)
    # Sorted by their starts, empty ones last; a stop travels in the low bits.
    pair = tl.sort(tl.where(stop > start, (start << 32) | stop, LARGEST))
    holds = pair != LARGEST
    start = tl.where(holds, pair >> 32, 0).to(tl.int32)
    stop = tl.where(holds, pair & LOW_32_BITS, 0).to(tl.int32)
    _, reached = tl.associative_scan((stop, tl.full([SLOTS], -1, tl.int32)), 0, _join)
    begins = holds & (start > reached)
    n_new = tl.where(holds, tl.maximum(stop - tl.maximum(start, reached), 0), 0)
    first = tl.cumsum(n_new, 0) - n_new
    place = (tile * n_slices + before) * ROWS + tl.cumsum(begins.to(tl.int32), 0) - 1
    tl.store(firsts + place, first, mask=begins)
    tl.store(shifts + place, start - first, mask=begins)
    counted = counts + (tile * n_levels + level) * 2
    tl.store(counted, tl.sum(begins.to(tl.int32), 0))
    tl.store(counted + 1, tl.sum(n_new, 0))
