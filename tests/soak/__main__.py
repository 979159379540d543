"""Long checks of the C++ kernel: ``python -m tests.soak``, or ``make soak``. They need GCC.

The kernel under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; equal bits in
many runs; many calls of varying sizes without growth. ``--size quick`` is a part of it for CI:
few problems, and the sanitizers see the baseline instruction set alone. It takes about a minute.
"""

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

from .endurance import check_bits, check_growth
from .sanitizers import capabilities, check_memory, check_threads


class Size(NamedTuple):
    """How much of each check."""

    problems: int
    runs: int
    calls: int
    all_instruction_sets: bool


SIZES = {"full": Size(1000, 1000, 2000, True), "quick": Size(40, 50, 120, False)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    size = SIZES[parser.parse_args().size]
    sets = capabilities() if size.all_instruction_sets else ["default"]
    checks: dict[str, Callable[[], object]] = {
        "threads": lambda: check_threads(size.problems),
        "memory": lambda: check_memory(size.problems, sets),
        "bits": lambda: check_bits(size.runs),
        "growth": lambda: check_growth(size.calls),
    }
    for name, check in checks.items():
        started = time.monotonic()
        found = check()
        print(f"{name}: {found}; {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
