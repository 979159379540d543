"""The kernel for AArch64: what its inner loops are compiled to, and that they compute the same."""

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
INCLUDES = [
    f"-I{Path(torch.__file__).parent / 'include'}",
    f"-I{ROOT / 'src' / 'vicinal' / 'backends' / 'cpu' / 'csrc'}",
]
OPTIONS = ["-std=c++20", "-O3", "-Wno-psabi", "-Wno-ignored-attributes"]
NATIVE = platform.system() == "Linux" and platform.machine() == "aarch64"
CROSS = "aarch64-linux-gnu-g++"
# Fused multiplications of a loop over eight keys, with rows of 8 and twice 16 vectors.
PER_LOOP = {"gather_dot": 8 * 7, "gather_weighted_sum": 8 * 16, "scatter_add_outer": 8 * 16}


def blocks_of(assembly: str, name: str) -> Iterator[list[str]]:
    """The instructions of a function template, divided at labels and at branches."""
    function = rf"^(_Z[\w.]*{name}I[\w.]*):.*?\n(.*?)^\s*\.size\s+\1"
    found = re.search(function, assembly, re.M | re.S)
    assert found, f"no function {name}"
    for block in re.split(r"^\S+:.*$|^\s+(?:b|cbn?z|tbn?z)\b.*$", found[2], flags=re.M):
        yield [line.strip() for line in block.splitlines() if not re.match(r"\s+[./#]", line)]


def fused(block: list[str]) -> int:
    """How many fused multiplications of whole vectors there are."""
    return sum(re.match(r"fmla\s+v\d+\.4s", line) is not None for line in block)


def spills(block: list[str]) -> list[str]:
    """Loads and stores of vector registers on the stack."""
    return [line for line in block if re.match(r"(ld|st)\w+\s+[qdv]\d+.*\[sp\b", line)]


def compile_for_aarch64(compiler: str, heads: int, program: Path) -> str:
    """Compiles the products for a layout, and returns the assembly."""
    cross = [] if NATIVE else ["--target=aarch64-linux-gnu"]
    command = [compiler, *(cross if compiler == "clang++" else [])]
    assembly = program.with_suffix(".s")
    source = Path(__file__).with_name("gathered.cpp")
    for step in (
        [*OPTIONS, *INCLUDES, f"-DHEADS={heads}", "-S", str(source), "-o", str(assembly)],
        ["-static", str(assembly), "-o", str(program)],
    ):
        subprocess.run([*command, *step], check=True, timeout=120)
    return assembly.read_text()


@pytest.mark.skipif(not NATIVE and shutil.which(CROSS) is None, reason=f"needs {CROSS}")
@pytest.mark.parametrize(("compiler", "heads"), [("g++" if NATIVE else CROSS, 2), ("clang++", 4)])
def test_inner_loops(compiler: str, heads: int, tmp_path: Path) -> None:
    """Their sums stay in the 32 registers, and they compute what plain loops do."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    program = tmp_path / "gathered"
    assembly = compile_for_aarch64(compiler, heads, program)
    for name, bar in PER_LOOP.items():
        loops = [block for block in blocks_of(assembly, name) if fused(block) >= 8]
        assert max(map(fused, loops)) >= bar, name
        assert [line for loop in loops for line in spills(loop)] == [], name
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if not NATIVE and emulator is None:
        pytest.skip("the code is as it should be; running it needs qemu-aarch64")
    run = [*([emulator] if emulator and not NATIVE else []), str(program)]
    done = subprocess.run(run, check=True, capture_output=True, text=True, timeout=120)
    assert 0 < float(done.stdout) < 2e-5


def test_spills_are_found() -> None:
    loop = "\tstr\tq5, [sp, 176]\n\tldr\tq5, [x1]\n\tfmla\tv4.4s, v5.4s, v0.4s\n"
    assembly = (
        f"_Z3fooIfEvv:\n\t.cfi_startproc\n.L2:\n{loop}\tb.ne\t.L2\n\tret\n\t.size\t_Z3fooIfEvv"
    )
    body = [block for block in blocks_of(assembly, "foo") if fused(block)]
    assert [spills(block) for block in body] == [["str\tq5, [sp, 176]"]]
