"""What a case gives: figures, or the reason why there are none; and running it in a process.

Cases run in processes of their own, so that memory and threads of one do not affect another.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.machine import ROOT

Figures = dict[str, float | str]

OUT_OF_MEMORY = "out of memory"
KILLED = "killed, most likely for its use of memory"
TOOK_LONGER = "took longer than"
DISAGREES = 3  # exit status of a case whose results differ from the library's
TIMEOUT = 3600.0  # seconds
ALLOCATION_FAILED = (
    "an't allocate memory", "annot allocate memory", "MemoryError", "bad_alloc",
    "CUDA out of memory", "CUDA error: out of memory", "HIP out of memory",
)  # fmt: skip

RETAINED = "retained-malloc/"
"""Prefix of cases in a process whose malloc keeps freed memory.

By default a large freed tensor goes back to the system, and the next one is fresh memory, which the
system clears page by page. That time depends on the machine and is not the library's."""
RETAINING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""The settings of the GNU C library for that, which it reads when the process starts."""


class CaseSkipped(Exception):  # noqa: N818 - not an error: the study reports it and goes on
    """A case that cannot run here; the message gives the reason."""


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise CaseSkipped(f"{package} is not installed")


class DisagreementError(AssertionError):
    """Two ways to compute the same thing differ, so there is nothing to measure."""


@dataclass(frozen=True)
class Outcome:
    """Of one case."""

    figures: Figures = field(default_factory=dict)
    problem: str | None = None
    """Why there are no figures."""

    @property
    def lacked_memory(self) -> bool:
        return self.problem in (OUT_OF_MEMORY, KILLED)

    @property
    def timed_out(self) -> bool:
        return (self.problem or "").startswith(TOOK_LONGER)

    def number(self, name: str) -> float:
        return float(self.figures[name])

    def find(self, name: str) -> float | None:
        """The number of that name, or None where there is none."""
        return self.number(name) if name in self.figures else None


def retain_freed_memory() -> None:
    """Starts this process again where malloc does not keep freed memory yet."""
    if "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", ()):
        raise CaseSkipped("only the GNU C library has settings to keep freed memory")
    if any(os.environ.get(name) != value for name, value in RETAINING.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **RETAINING})


def run_command(
    command: Sequence[str], *, environment: Mapping[str, str] = {}, timeout: float = TIMEOUT
) -> Outcome:
    """The outcome that ``command`` prints as its last line, or the reason why it ended."""
    env = {**os.environ, **environment}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return Outcome(problem=f"{TOOK_LONGER} {timeout:.0f} s")
    if done.returncode == DISAGREES:
        raise DisagreementError(_last_line(done.stderr))
    if done.returncode == 0:
        return Outcome(**json.loads(_last_line(done.stdout)))
    if any(message in done.stderr for message in ALLOCATION_FAILED):
        return Outcome(problem=OUT_OF_MEMORY)
    if done.returncode == -signal.SIGKILL:
        return Outcome(problem=KILLED)
    if done.returncode < 0:
        return Outcome(problem=f"ended by {signal.Signals(-done.returncode).name}")
    return Outcome(problem=f"failed: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1].strip()
