"""The first eight minutes on a GPU: ``python -m benchmarks.first``, or ``make gpu-first``.

Runs tests and measurements, the most important first. Needs no network, only PyTorch with its
Triton, pytest and hypothesis. Each step has a time limit and saves what it gave before the next
one begins; one that fails stops no other.
"""

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import report
from benchmarks.cases import SETTINGS
from benchmarks.machine import ROOT, file_stem, usable_cores

NO_GPU = "it needs a GPU, and PyTorch finds none"
MAX_SHARDS = 12  # each has Triton and a context on the GPU of its own
TAIL = 3000  # characters of each log that the summary file repeats
SPARE = 5.0  # seconds before its limit at which a study ends by itself
SECONDS = "{seconds}"  # in a command, replaced by the time that its study has
NO_TESTS, NO_PROGRAM = 5, 127  # exit statuses of pytest, and of shells
NO_PERMISSION = "ERR_NVGPUCTRPERM"  # printed by ncu where users may not read counters
METRICS = {
    "gpu__time_duration.sum": "ns",
    "smsp__inst_executed.sum": "instructions",
    "lts__t_sectors.sum": "L2 sectors",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
}


class Step(NamedTuple):
    """Commands that run side by side; the step ends when all have, or at its limit."""

    name: str
    seconds: float
    commands: Sequence[Sequence[str]]


@dataclass
class Result:
    """What a step gave."""

    name: str
    limit: float
    status: str  # passed, failed, timed out or refused
    seconds: float = 0.0
    reason: str = ""
    tails: list[str] = field(default_factory=list)
    """The end of what each command printed."""


def all_steps(out: Path) -> list[Step]:
    """In order; ``out`` gets the figures. The limits sum to less than eight minutes."""
    shards = max(1, min(usable_cores(), MAX_SHARDS))
    ncu, sanitizer = _tool("ncu"), _tool("compute-sanitizer")
    forged = "tests/backends/test_triton.py::test_forged_plans_stay_in_their_buffers"
    profile = [
        ncu, "--csv", "--page", "raw", "--clock-control", "none", "--profile-from-start", "off",
        "--metrics", ",".join(METRICS), "--kernel-name", f"regex:^({'|'.join(kernel_names())})$",
        *_python("benchmarks.profiled"),
    ]  # fmt: skip
    # Each tensor in an allocation of its own, so that accesses beyond its end are errors.
    memcheck = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer]
    memcheck += ["--tool", "memcheck", "--report-api-errors", "no"]
    memcheck += ["--error-exitcode", "7", *_python("pytest", "-q", f"{forged}[0]")]
    return [
        Step("gpu tests", 90, _sharded(min(shards, 4), "tests/test_gpu.py")),
        Step("triton tests", 100, _sharded(shards, *triton_tests())),
        _study(out, "figures", 90, "attention", "plan", "kernels", "compute", "replayed"),
        Step("cost model and ncu", 60, [_python("benchmarks.kernels", "--costs"), profile]),
        _study(out, "sweep", 50, "sweep"),
        _study(out, "flex", 40, "agreement/flex", "baselines/flex"),
        Step("sanitizer", 40, [memcheck]),
    ]  # fmt: skip


def triton_tests() -> list[str]:
    """The files of tests that run kernels on a GPU."""
    files = (ROOT / "tests/backends").glob("test_triton*.py")
    names = sorted(file.name for file in files if not file.stem.endswith("_compiled"))
    return [f"tests/backends/{name}" for name in (*names, "test_no_stalls.py")] + [
        "tests/_index/test_sampling.py"
    ]


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _sharded(n: int, *files: str) -> list[list[str]]:
    """The tests of ``files`` in ``n`` processes, whatever plugins pytest has."""
    # Without the CPU kernel tests compare with the reference, of which the package warns.
    options = "-v", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore:vicinal:RuntimeWarning"
    return [_python("pytest", *options, f"--shard={i}/{n}", *files) for i in range(n)]


def _study(out: Path, name: str, seconds: float, *cases: str) -> Step:
    options = "--device", "cuda", "--resume", "--seconds", SECONDS, "--out", str(out)
    return Step(name, seconds, [_python("benchmarks", *options, "--only", *cases)])


def _tool(name: str) -> str:
    """The path of one of CUDA's tools."""
    folders = [Path("/usr/local/cuda/bin"), *sorted(Path("/opt/nvidia").glob("nsight-compute/*"))]
    found = (shutil.which(name, path=str(folder)) for folder in folders)
    return shutil.which(name) or next((path for path in found if path), name)


def kernel_names() -> list[str]:
    """Of the library's Triton kernels, and of the functions they call."""
    files = sorted((ROOT / "src/vicinal/backends/triton").rglob("*.py"))
    kernels = (re.findall(r"@triton\.jit.*\ndef (\w+)", file.read_text()) for file in files)
    return [name for names in kernels for name in names]


def run_all(
    steps: Sequence[Step], about: Mapping[str, Any], stem: Path, gpu: bool = True
) -> list[Result]:
    """Runs the steps and saves after each. What one leaves of its time, those after it may take."""
    results: list[Result] = []
    began, allowed = time.monotonic(), 0.0
    folder = stem.with_name(stem.name + "-logs")
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        allowed += step.seconds
        limit = allowed - (time.monotonic() - began)
        print(f"{step.name} (at most {limit:.0f} s) ...", end=" ", file=sys.stderr, flush=True)
        if gpu:
            result = run_step(step, folder, limit)
        else:
            result = Result(step.name, limit, "refused", reason=NO_GPU)
        print(f"{result.status}, {result.seconds:.0f} s", file=sys.stderr, flush=True)
        results.append(result)
        saved = {**about, "steps": [asdict(each) for each in results]}
        stem.with_name(stem.name + ".json").write_text(json.dumps(saved, indent=1) + "\n")
    return results


def run_step(step: Step, folder: Path, limit: float) -> Result:
    """Runs the commands of a step; ends what is left of them after ``limit`` seconds."""
    began = time.monotonic()
    logs = [folder / f"{step.name.replace(' ', '-')}-{i}.log" for i in range(len(step.commands))]
    study_seconds = f"{max(limit - SPARE, 0):.0f}"
    commands = [
        [part.replace(SECONDS, study_seconds) for part in command] for command in step.commands
    ]
    running = [_start(*pair) for pair in zip(commands, logs, strict=True)]
    codes = [_end(process, began + limit) for process in running]
    text = [log.read_text(errors="replace") for log in logs]
    reason = "; ".join(dict.fromkeys(_last_line(part) for part in text))
    seconds = time.monotonic() - began
    pairs = zip(codes, text, strict=True)
    codes = [NO_PROGRAM if NO_PERMISSION in part else code for code, part in pairs]
    status, tails = _status(codes), [part[-TAIL:] for part in text]
    if status == "passed" and "skipped" in reason and "passed" not in reason:
        status = "refused"  # no test ran
    return Result(step.name, limit, status, seconds, reason, tails)


def _status(codes: Sequence[int | None]) -> str:
    """Of a step, from the exit statuses of its commands; None is that of a killed one."""
    if len(codes) > 1:  # a shard may have no tests
        codes = [0 if code == NO_TESTS else code for code in codes]
    if any(code not in (0, None, NO_PROGRAM) for code in codes):
        return "failed"
    if None in codes:
        return "timed out"
    return "refused" if NO_PROGRAM in codes else "passed"


def _start(command: Sequence[str], log: Path) -> "subprocess.Popen[bytes] | None":
    """The process; None where there is no such program."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        try:
            return subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            output.write(f"{command[0]} does not run: {error.strerror}\n".encode())
            return None


def _end(process: "subprocess.Popen[bytes] | None", at: float) -> int | None:
    """The exit status; None if the process was killed, with its children, at that time."""
    if process is None:
        return NO_PROGRAM
    try:
        return process.wait(max(0.0, at - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1].strip(" =")[:200]


def profiled_kernels(text: str) -> Iterator[tuple[str, ...]]:
    """The kernel and its metrics, a row per launch that ``ncu --csv --page raw`` printed."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = csv.DictReader(lines)
    next(rows, None)  # the units
    for row in rows:
        name = row.get("Kernel Name")
        if name is not None:
            yield name, *(row.get(metric) or "-" for metric in METRICS)


def show(results: Sequence[Result], folder: Path) -> None:
    """Prints what the steps gave and what ncu measured."""
    rows = [
        (each.name, each.status, f"{each.seconds:.0f} s", f"{each.limit:.0f} s", each.reason)
        for each in results
    ]
    print(report.table(("step", "", "took", "limit", ""), rows))
    logs = sorted(folder.glob("cost-model-and-ncu-*.log"))
    for log in logs:
        text = log.read_text(errors="replace")
        kernels = [*profiled_kernels(text)]
        if kernels:
            print("\nncu, a training step")
            print(report.table(("", *METRICS.values()), kernels))
        else:
            print(f"\n{log.stem}\n{text[-TAIL:]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first", description=__doc__)
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the results")
    out = parser.parse_args().out.resolve()
    gpu = torch.cuda.is_available()
    settings = SETTINGS["cuda"]["full"]
    about = report.describe(settings if gpu else settings._replace(device="cpu"), "first")
    name = torch.cuda.get_device_name() if gpu else "no GPU"
    stem = out / f"first-{file_stem(about['commit'], name)}"
    results = run_all(all_steps(out), about, stem, gpu)
    show(results, stem.with_name(stem.name + "-logs"))
    print(f"\nSaved: {stem}.json")
    if not gpu:
        print(f"No step ran: {NO_GPU}.", file=sys.stderr)
    return 0 if all(each.status == "passed" for each in results) else 2 if not gpu else 1


if __name__ == "__main__":
    sys.exit(main())
