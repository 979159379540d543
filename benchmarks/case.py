"""One case of the study: ``python -m benchmarks.case --case NAME --size quick --json``.

Prints its figures, with --json as one line that `benchmarks.runner` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys

from benchmarks.cases import Case, all_cases
from benchmarks.machine import available_memory
from benchmarks.outcome import DisagreementError, Figures, Unable
from benchmarks.runner import DISAGREES
from benchmarks.sizes import SIZES

SPARE = 2**30  # bytes of the memory at hand that are left to others


def main() -> int:
    arguments = _parse()
    case = all_cases(SIZES[arguments.size])[arguments.case]
    _limit_memory()
    return tell(case, arguments.json)


def tell(case: Case, as_json: bool) -> int:
    """Prints the case's figures, or why there are none, and returns the exit status."""
    answer: dict[str, Figures | str]
    try:
        answer = {"figures": case()}
    except Unable as reason:
        answer = {"problem": str(reason)}
    except DisagreementError as difference:
        print(difference, file=sys.stderr)
        return DISAGREES
    if as_json:
        print(json.dumps(answer))
        return 0
    figures = answer.get("figures")
    for name, value in figures.items() if isinstance(figures, dict) else answer.items():
        print(f"{name:36} {value:.6g}" if isinstance(value, float) else f"{name:36} {value}")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.case", description=__doc__)
    parser.add_argument("--case", required=True, metavar="NAME", help="see benchmarks.study --list")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args()
    if arguments.case not in all_cases(SIZES[arguments.size]):
        parser.error(f"argument --case: no {arguments.case!r}; see benchmarks.study --list")
    return arguments


def _limit_memory() -> None:
    """Lets an allocation fail beyond the memory at hand, before the system ends some process."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit = max(available_memory() - SPARE, SPARE)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    sys.exit(main())
