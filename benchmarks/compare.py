"""Two commits side by side: ``python -m benchmarks.compare A B``, or ``make bench-compare A= B=``.

Builds both and runs the same script on them, that of this working tree, by turns in processes of
their own. Prints how long B takes as a part of what A takes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.outcome import Figures
from benchmarks.report import duration, table
from benchmarks.runner import run_case
from benchmarks.sizes import SIZES


def main() -> int:
    arguments = _parse()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vicinal-")))
        builds = [
            stack.enter_context(built(commit, folder / side))
            for side, commit in (("a", arguments.a), ("b", arguments.b))
        ]
        runs = take_turns(builds, arguments.size, arguments.rounds)
    print(f"B, {arguments.b}, beside A, {arguments.a}:")
    print(ratios(*runs))
    return 0


@contextlib.contextmanager
def built(commit: str, folder: Path) -> Iterator[Path]:
    """The folder that holds the package of ``commit``, its kernel compiled.

    Raises:
        SystemExit: there is no such commit, or its kernel does not build.
    """
    print(f"Building {commit} ...", file=sys.stderr, flush=True)
    _run(["git", "worktree", "add", "--quiet", "--detach", str(folder), commit], ROOT)
    try:
        said = _run([sys.executable, "setup.py", "build_ext", "--inplace"], folder)
        if not list(folder.glob("src/vicinal/**/_cpu*.so")):
            raise SystemExit(f"The kernel of {commit} does not build:\n{said}")
        yield folder / "src"
    finally:
        _run(["git", "worktree", "remove", "--force", str(folder)], ROOT)


def take_turns(builds: Sequence[Path], size: str, rounds: int) -> list[list[Figures]]:
    """Seconds of each build in every round."""
    runs: list[list[Figures]] = [[] for _ in builds]
    for index in range(rounds):
        print(f"Round {index + 1} of {rounds} ...", file=sys.stderr, flush=True)
        # There and back again, so that neither always comes first.
        for build in range(len(builds))[:: 1 if index % 2 == 0 else -1]:
            runs[build].append(_seconds(builds[build], size))
    return runs


def _seconds(build: Path, size: str) -> Figures:
    # Modules of this tree, the package of the build: it stands before what is installed.
    path = os.pathsep.join([str(build), str(ROOT)])
    outcome = run_case("speed", size, environment={"PYTHONPATH": path})
    if outcome.problem is not None:
        raise SystemExit(f"{build}: {outcome.problem}")
    where = outcome.figures.pop("package")
    if Path(str(where)).parent != build:
        raise SystemExit(f"{where} was measured instead of {build}")
    return outcome.figures


def ratios(first: Sequence[Figures], second: Sequence[Figures]) -> str:
    """A table: the median ratio of the rounds, and the smallest and the largest."""
    rows = []
    for name in first[0]:
        before, after = ([float(run[name]) for run in runs] for runs in (first, second))
        each = [b / a for a, b in zip(before, after, strict=True)]
        rows.append(
            (
                name,
                duration(statistics.median(before)),
                duration(statistics.median(after)),
                f"{statistics.median(each):.3f}",
                f"{min(each):.3f} to {max(each):.3f}",
            )
        )
    return table(("", "A", "B", "B / A", "of all rounds"), rows)


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr.strip()}")
    return done.stdout + done.stderr


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Times two commits by turns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("a", help="the commit to compare with")
    parser.add_argument("b", help="the commit to judge")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each")
    parser.add_argument("--size", choices=SIZES, default="full", help="quick: to see that it runs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
