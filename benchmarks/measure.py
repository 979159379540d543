"""How long a call takes and how much memory it needs, on the CPU."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Call = Callable[[], object]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5)


def median_time(fn: Call, repeats: int = 5) -> float:
    """Seconds that ``fn()`` takes: the median of ``repeats`` calls, after one that warms up."""
    fn()
    return statistics.median(_seconds(fn) for _ in range(repeats))


class Turns(NamedTuple):
    """Seconds of calls that took turns: ``[calls][repeats]``."""

    seconds: tuple[tuple[float, ...], ...]

    def median(self, call: int) -> float:
        """Seconds."""
        return statistics.median(self.seconds[call])

    def ratio(self, call: int, base: int) -> float:
        """How many times longer ``call`` takes than ``base``: the median over the turns."""
        pairs = zip(self.seconds[call], self.seconds[base], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


class TakeTurns(Protocol):
    """What `take_turns` does, by whatever clock."""

    def __call__(self, *calls: Call, repeats: int) -> Turns: ...


def take_turns(*calls: Call, repeats: int) -> Turns:
    """Times ``repeats`` rounds of all ``calls``, after one that warms up.

    They take turns, so a machine that is faster now than then does not favour any.
    """
    for call in calls:
        call()
    rounds = [[_seconds(call) for call in calls] for _ in range(repeats)]
    return Turns(tuple(zip(*rounds, strict=True)))


def _seconds(fn: Call) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Returns when a GPU has done what it was told to; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(fn: Call) -> int:
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
