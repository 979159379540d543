"""The C++ kernel compiled with sanitizers, on random and on hostile problems."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import vicinal

ROOT = Path(__file__).parents[2]
PACKAGE = Path(vicinal.__file__).parent
SOURCES = ROOT / "src" / "vicinal" / "backends" / "cpu" / "csrc"
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-g1", "-fno-omit-frame-pointer", "-Wno-psabi"]
FLAGS += ["-Wno-ignored-attributes", f"-I{TORCH / 'include'}", f"-I{SOURCES}"]
HOSTILE = (
    "from test_cpu import survive_bad_plans; survive_bad_plans({trials});"
    "from test_sampling import survive_bad_tables; survive_bad_tables({trials})"
)


def capabilities() -> list[str]:
    """The instruction sets of this processor that the kernel has code for."""
    known = torch.backends.cpu.get_cpu_capability().lower()
    order = ["default", "avx2", "avx512"]
    return order[: order.index(known) + 1] if known in order else ["default"]


def check_threads(problems: int) -> str:
    """Runs the kernel on plain threads under ThreadSanitizer, which must find no race."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "races"
        source = Path(__file__).with_name("races.cpp")
        _run(["g++", *FLAGS, "-O1", "-fsanitize=thread", str(source), "-o", str(program)])
        return _run([str(program), str(problems)], TSAN_OPTIONS="halt_on_error=1").strip()


def check_memory(problems: int, instruction_sets: Sequence[str]) -> str:
    """Runs random problems and forged plans on a kernel with AddressSanitizer and
    UndefinedBehaviorSanitizer, once per instruction set.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "vicinal"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        _build(package / "backends" / "cpu" / "_cpu.abi3.so", instruction_sets == ["default"])
        tests = [ROOT, *(ROOT / "tests" / name for name in ("", "backends", "_index"))]
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, (folder, *tests))),
            "LD_PRELOAD": " ".join(_library(name) for name in ("libasan.so", "libubsan.so")),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python does not free all that it allocates
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        random = ["-m", "tests.random_problems", "--backend", "cpu", "--problems", str(problems)]
        for name in instruction_sets:
            for command in (random, ["-c", HOSTILE.format(trials=problems)]):
                _run([sys.executable, *command], ATEN_CPU_CAPABILITY=name, **environment)
    return f"{problems} random and {problems} hostile problems on {', '.join(instruction_sets)}"


def _build(library: Path, baseline_only: bool) -> None:
    """Compiles the kernel with sanitizers whose findings end the process."""
    options = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-fvisibility=hidden"]
    # Of few problems, compiling takes most of the time, and half as long without optimization.
    options += ["-O0", "-DVICINAL_BASELINE_ONLY"] if baseline_only else ["-O1"]
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    link = ["-shared", "-fPIC", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", str(library)]
    sources = map(str, sorted(SOURCES.rglob("*.cpp")))
    _run(["g++", *FLAGS, *options, *checks, *sources, *link])


def _library(name: str) -> str:
    return _run(["g++", f"-print-file-name={name}"]).strip()


def _run(command: Sequence[str], **environment: str) -> str:
    """What ``command`` prints; raises SystemExit with its last words if it fails."""
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        words = done.stdout[-2000:] + done.stderr[-4000:]
        raise SystemExit(f"exit {done.returncode} of {' '.join(command[:4])} ...\n{words}")
    return done.stdout
