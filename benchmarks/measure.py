"""How long a call takes and how much memory it needs, on the CPU."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5)


def median_time(fn: Callable[[], object], repeats: int = 5) -> float:
    """Seconds that ``fn()`` takes: the median of ``repeats`` calls, after one that warms up."""
    fn()
    return statistics.median(_seconds(fn) for _ in range(repeats))


def time_ratio(fn: Callable[[], object], base: Callable[[], object], repeats: int = 7) -> float:
    """How many times longer ``fn()`` takes than ``base()``: the median of ``repeats`` pairs.

    The two take turns, so a machine that is faster now than then does not favour either.
    """
    fn()
    base()
    return statistics.median(_seconds(fn) / _seconds(base) for _ in range(repeats))


def _seconds(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def peak_memory(fn: Callable[[], object]) -> int:
    """Bytes that the process holds at the peak of ``fn()``, above what it held before.

    Resident memory as the operating system sees it, so the work space of libraries counts as well.
    Call ``fn`` once before, or what it sets up for good (threads, packed weights) counts too.

    Where the system cannot reset the peak (elsewhere than on Linux), only what exceeds the highest
    peak of the process so far is seen: measure in a fresh process there.
    """
    _give_back_freed_memory()
    if not _reset_peak():
        before = _lifetime_peak()
        fn()
        return _lifetime_peak() - before
    before = _status_bytes("VmRSS")
    fn()
    return max(0, _status_bytes("VmHWM") - before)


def _give_back_freed_memory() -> None:
    """Unmaps what malloc keeps of freed memory: reused, it would hide a part of the next peak."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)


def _reset_peak() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    """A field of /proc/self/status, which counts in KiB."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise OSError(f"{_STATUS} has no {field}")


def _lifetime_peak() -> int:
    if resource is None:
        raise OSError("no way to measure peak memory on this system")
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
