"""Wheels with and without a kernel, built with a compiler that copies the kernel or fails."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vicinal.backends.cpu import library

ROOT = Path(__file__).parents[2]
# What a build reads; the tests, pages and figures would only take time to copy.
SOURCES = ("build_backend", "src/vicinal", "pyproject.toml", "setup.py", "README.md", "LICENSE")
COMPILER = """\
#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in -c) compiles=1 ;; -o) shift; out=$1 ;; esac
  shift
done
if [ "$compiles" ]; then : > "$out"; else cp "$KERNEL" "$out"; fi
"""
BUILD = """
import sys
sys.path.insert(0, "build_backend")
import vicinal_build_meta as backend
getattr(backend, sys.argv[1])(sys.argv[2])
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without the kernel."""
    root = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "no_kernel.txt")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, root / name)
    shutil.copy(ROOT / "MANIFEST.in", root)
    return root


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiler that gives empty objects, and links them to the kernel that is built in place."""
    path = tmp_path_factory.mktemp("compiler") / "c++"
    path.write_text(COMPILER)
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def _no_leftovers(sources: Path) -> Iterator[None]:
    yield
    shutil.rmtree(sources / "build", ignore_errors=True)
    for pattern in ("_cpu*.so", "no_kernel.txt"):
        for path in sources.rglob(pattern):
            path.unlink()


def run(
    sources: Path, arguments: list[str], compiler: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python in the sources with that compiler for C and C++."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=sources,
        env={
            **{key: value for key, value in os.environ.items() if key != "VICINAL_REQUIRE_KERNEL"},
            "CC": compiler,
            "CXX": compiler,
            "KERNEL": str(library.find_library()),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


def build(sources: Path, out: Path, compiler: str, hook: str = "build_wheel") -> tuple[Path, str]:
    """Builds by a hook of the build backend; returns the one file and what was printed."""
    finished = run(sources, ["-c", BUILD, hook, str(out)], compiler)
    assert finished.returncode == 0, finished.stdout
    (file,) = out.glob("vicinal-*")
    return file, finished.stdout


def names_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def wheel_file(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        return archive.read(name).decode()


def last_lines(output: str) -> str:
    return "\n".join(output.strip().splitlines()[-5:])


def test_a_wheel_with_a_kernel_serves_all_pythons_of_a_platform(
    sources: Path, compiler: Path, tmp_path: Path
) -> None:
    wheel, output = build(sources, tmp_path, str(compiler))
    assert wheel.name.split("-", 2)[2].startswith("cp310-abi3-")
    assert not wheel.name.endswith("-any.whl")
    assert "Root-Is-Purelib: false" in wheel_file(wheel)
    kernels = [name for name in names_of(wheel) if name.endswith(".so")]
    assert kernels == ["vicinal/backends/cpu/_cpu.abi3.so"]
    assert "no_kernel.txt" not in str(names_of(wheel))
    assert "WITHOUT" not in output


def test_wheels_hold_what_runs_and_no_sources_of_the_kernel(
    sources: Path, compiler: Path, tmp_path: Path
) -> None:
    wheel, _ = build(sources, tmp_path, str(compiler))
    names = set(names_of(wheel))
    assert not {name for name in names if name.endswith((".h", ".cpp"))}
    assert not {name for name in names if not name.startswith("vicinal")}
    needed = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src" / "vicinal").rglob("*")
        if path.suffix in (".py", ".js", ".css", ".html", ".typed") or path.name == "py.typed"
    }
    assert needed <= names
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        description = archive.read(metadata).decode()
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert len(links) > 10
    assert all(link.startswith("https://") for link in links)  # it is shown apart from its files


@pytest.mark.parametrize("broken", ["false", "a-compiler-that-is-not-there"])
def test_without_a_compiler_the_wheel_is_pure_and_the_build_ends_by_saying_so(
    broken: str, sources: Path, tmp_path: Path
) -> None:
    wheel, output = build(sources, tmp_path, broken)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in wheel_file(wheel)
    assert "Tag: py3-none-any" in wheel_file(wheel)
    assert not [name for name in names_of(wheel) if name.endswith(".so")]
    assert "WITHOUT" in last_lines(output)
    assert broken in last_lines(output)
    with zipfile.ZipFile(wheel) as archive:
        assert broken in archive.read("vicinal/backends/cpu/no_kernel.txt").decode()


def test_a_kernel_of_an_earlier_build_does_not_stay(
    sources: Path, compiler: Path, tmp_path: Path
) -> None:
    build(sources, tmp_path / "first", str(compiler))
    (sources / "src/vicinal/backends/cpu/csrc/ops.cpp").touch()
    wheel, _ = build(sources, tmp_path / "second", "false")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names_of(wheel) if name.endswith(".so")]
    wheel, _ = build(sources, tmp_path / "third", str(compiler))
    assert "abi3" in wheel.name
    assert "no_kernel.txt" not in str(names_of(wheel))


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_a_required_kernel_that_fails_stops_the_build(
    value: str, sources: Path, tmp_path: Path
) -> None:
    arguments = ["-c", BUILD, "build_wheel", str(tmp_path)]
    finished = run(sources, arguments, "false", VICINAL_REQUIRE_KERNEL=value)
    assert (finished.returncode != 0) == (value == "1")
    assert (not list(tmp_path.glob("*.whl"))) == (value == "1")
    assert ("VICINAL_REQUIRE_KERNEL is set" in finished.stdout) == (value == "1")


def test_an_editable_build_leaves_a_kernel_or_a_reason_in_place(
    sources: Path, compiler: Path, tmp_path: Path
) -> None:
    folder = sources / "src/vicinal/backends/cpu"
    build(sources, tmp_path / "first", str(compiler), "build_editable")
    assert library.find_library(folder)
    (folder / "csrc" / "ops.cpp").touch()
    _, output = build(sources, tmp_path / "second", "false", "build_editable")
    assert "WITHOUT" in last_lines(output)
    assert not library.find_library(folder)
    assert "false'" in library.missing_reason(folder)


def test_a_build_in_place_without_a_compiler_says_so(sources: Path) -> None:
    finished = run(sources, ["setup.py", "-q", "build_ext", "--inplace"], "false")
    assert finished.returncode == 0
    assert "WITHOUT" in last_lines(finished.stdout)
    assert "false'" in library.missing_reason(sources / "src/vicinal/backends/cpu")


def test_an_sdist_builds_the_wheel(sources: Path, compiler: Path, tmp_path: Path) -> None:
    sdist, _ = build(sources, tmp_path / "sdist", "false", "build_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.name.startswith("vicinal-"))
    csrc = "src/vicinal/backends/cpu/csrc"
    assert {path.relative_to(unpacked) for path in (unpacked / csrc).rglob("*.*")} == {
        path.relative_to(ROOT) for path in (ROOT / csrc).rglob("*.*")
    }
    wheel, _ = build(unpacked, tmp_path / "wheel", str(compiler))
    assert "abi3" in wheel.name
