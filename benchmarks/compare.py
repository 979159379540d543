"""Two commits side by side: ``python -m benchmarks.compare A B``, or ``make bench-compare A= B=``.

Builds both and runs the case "speed" of this working tree on them, alternately, in processes of
their own. Prints the times of B over those of A, and warns of each that is longer beyond noise: in
every round by more than `NOISE`.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.__main__ import run_case
from benchmarks.cases import SPEED
from benchmarks.machine import ROOT
from benchmarks.outcome import Figures
from benchmarks.report import table, text_of

NOISE = 1.05  # ratio of two runs of the same code on a machine that others use too


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("a", help="the commit to compare with")
    parser.add_argument("b", help="the commit to judge")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each; default: 5")
    parser.add_argument("--size", choices=("full", "quick"), default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    runs: tuple[list[Figures], list[Figures]] = [], []
    with built(arguments.a) as a, built(arguments.b) as b:
        sides = list(zip(runs, (a, b), strict=True))
        for _ in range(arguments.rounds):
            for side, build in sides:
                side.append(_seconds(build, arguments.device, arguments.size))
            sides.reverse()  # neither is always first
    print(f"B, {arguments.b}, over A, {arguments.a}:")
    print(ratios(*runs))
    for message in slower(*runs):
        print(f"{'::warning::' if os.environ.get('GITHUB_ACTIONS') else 'warning: '}{message}")
    return 0


@contextlib.contextmanager
def built(commit: str) -> Iterator[Path]:
    """A folder that holds the package of ``commit``, its kernel compiled."""
    print(f"Building {commit} ...", file=sys.stderr, flush=True)
    folder = Path(tempfile.mkdtemp(prefix="vicinal-"))
    _run(["git", "worktree", "add", "--quiet", "--detach", str(folder), commit], ROOT)
    try:
        _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], folder)
        if not list(folder.glob("src/vicinal/**/_cpu*.so")):
            raise SystemExit(f"The kernel of {commit} does not build")
        yield folder / "src"
    finally:
        _run(["git", "worktree", "remove", "--force", str(folder)], ROOT)


def _seconds(build: Path, device: str, size: str) -> Figures:
    # The package of the build comes before what is installed; benchmarks are those of this tree.
    outcome = run_case(SPEED, device, size, path=os.pathsep.join([str(build), str(ROOT)]))
    if outcome.problem is not None:
        raise SystemExit(f"{build}: {outcome.problem}")
    package = Path(str(outcome.figures.pop("package")))
    if package.parent != build:
        raise SystemExit(f"{package} was measured instead of {build}")
    return outcome.figures


def ratios(first: Sequence[Figures], second: Sequence[Figures]) -> str:
    """A table: the median ratio of the rounds, and the smallest and the largest."""
    rows = []
    for name in first[0]:
        times = (
            text_of("seconds", statistics.median(float(run[name]) for run in runs))
            for runs in (first, second)
        )
        each = _ratios_of(name, first, second)
        extremes = f"{min(each):.3f} to {max(each):.3f}"
        rows.append((name, *times, f"{statistics.median(each):.3f}", extremes))
    return table(("", "A", "B", "B / A", "of all rounds"), rows)


def slower(first: Sequence[Figures], second: Sequence[Figures]) -> list[str]:
    """What took longer in every round, beyond noise."""
    each = {name: _ratios_of(name, first, second) for name in first[0]}
    return [
        f"{name} takes {statistics.median(found):.2f} times as long, at least {min(found):.2f}"
        for name, found in each.items()
        if min(found) > NOISE
    ]


def _ratios_of(name: str, first: Sequence[Figures], second: Sequence[Figures]) -> list[float]:
    """The ratio of a figure in each round."""
    return [float(b[name]) / float(a[name]) for a, b in zip(first, second, strict=True)]


def _run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
