"""One case of the study on a GPU: ``python -m benchmarks.gpu.case --case NAME --json``.

Prints its figures, with --json as one line that `benchmarks.runner` reads. With --dry-run it runs
on the CPU, where Triton interprets its kernels if TRITON_INTERPRET=1 is set, at a tiny size.
"""

from __future__ import annotations

import argparse
import sys

import torch

from benchmarks.case import tell
from benchmarks.gpu.cases import all_cases
from benchmarks.gpu.sizes import SIZES
from benchmarks.outcome import Outcome
from benchmarks.runner import run_command


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.case", description=__doc__)
    parser.add_argument("--case", required=True, metavar="NAME", help="see benchmarks.gpu --list")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at a tiny size")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args()
    cases = all_cases(SIZES[size_of(arguments.dry_run)], device_of(arguments.dry_run))
    if arguments.case not in cases:
        parser.error(f"argument --case: no {arguments.case!r}; see benchmarks.gpu --list")
    return tell(cases[arguments.case], arguments.json)


def size_of(dry_run: bool) -> str:
    return "quick" if dry_run else "full"


def device_of(dry_run: bool) -> torch.device:
    return torch.device("cpu" if dry_run else "cuda")


def run_case(name: str, dry_run: bool) -> Outcome:
    """The outcome of a case in a process of its own.

    Raises:
        DisagreementError: a peer computes something else than the library.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.case", "--case", name, "--json"]
    if dry_run:
        return run_command([*command, "--dry-run"], environment={"TRITON_INTERPRET": "1"})
    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
