"""Runs cases in processes of their own, so that one's memory and threads are no other's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from benchmarks.allocator import KEEPING, SETTINGS
from benchmarks.machine import ROOT
from benchmarks.outcome import KILLED, OUT_OF_MEMORY, DisagreementError, Outcome

DISAGREES = 3  # the exit status of a case whose peer disagrees
TIMEOUT = 3600.0  # seconds
ALLOCATION_FAILED = (
    "can't allocate memory",
    "annot allocate memory",
    "MemoryError",
    "bad_alloc",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "HIP out of memory",
)


def run_case(name: str, size: str, *, environment: Mapping[str, str] | None = None) -> Outcome:
    """The outcome of a case of `benchmarks.cases`, in the environment that it asks for.

    Raises:
        DisagreementError: a peer computes something else than the library.
    """
    command = [sys.executable, "-m", "benchmarks.case", "--case", name, "--size", size, "--json"]
    if name.startswith(KEEPING):
        environment = {**SETTINGS, **(environment or {})}
    return run_command(command, environment=environment)


def run_command(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> Outcome:
    """The outcome that ``command`` prints as its last line, or how it died.

    Raises:
        DisagreementError: the exit status says so.
    """
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return Outcome(problem=f"took longer than {timeout:.0f} s")
    if done.returncode == DISAGREES:
        raise DisagreementError(_last_line(done.stderr))
    if done.returncode != 0:
        return Outcome(problem=_how_it_died(done.returncode, done.stderr))
    return Outcome(**json.loads(_last_line(done.stdout)))


def _how_it_died(status: int, stderr: str) -> str:
    if any(sign in stderr for sign in ALLOCATION_FAILED):
        return OUT_OF_MEMORY
    if status == -signal.SIGKILL:
        return KILLED
    if status < 0:
        return f"died of {signal.Signals(-status).name}"
    return f"failed: {_last_line(stderr)}"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "no word"
