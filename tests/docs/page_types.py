"""The code on the README and on all pages has types that a strict checker accepts.

A part of `make lint`, since the checker reads the types of torch, which takes long.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs.test_docs_code import CODE_OF_PAGES

pytest.importorskip("mypy")

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
CACHE = ROOT / ".mypy_cache" / "pages"  # stays for the next run: the types of torch take long
# Half of the time of a first run goes into these parts of torch, from which no page takes a type.
SKIPPED = (
    *("torch._inductor", "torch._dynamo", "torch._functorch", "torch._higher_order_ops"),
    *("torch._export", "torch._numpy", "torch._refs", "torch._decomp", "torch._subclasses"),
    *("torch._meta_registrations", "torch.ao"),
)
USED = "torch._inductor,torch._inductor.codecache,torch._dynamo,torch._dynamo.config"  # by pages
# Errors of the pages alone; packages whose types are missing or partial where they are installed;
# parts of torch carry no types.
SETTINGS = f"""[mypy]
strict = true
ignore_missing_imports = true
disallow_subclassing_any = false
disallow_untyped_calls = false
implicit_reexport = true
disallow_untyped_decorators = false
[mypy-vicinal.*]
ignore_errors = true
[mypy-{",".join(f"{name}.*" for name in SKIPPED)}]
follow_imports = skip
[mypy-{USED}]
follow_imports = normal
"""


def check(folder: Path) -> str:
    """What mypy prints of the files in a folder."""
    (folder / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    environment = {**os.environ, "MYPYPATH": str(SOURCE)}
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        "mypy.ini",
        "--cache-dir",
        str(CACHE),
        ".",
    ]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return run.stdout + run.stderr


def is_installed(code: str) -> bool:
    """Whether the packages that a block imports are installed. Without one, its names are Any."""
    modules = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
    return all(importlib.util.find_spec(module) for module in modules)


def write_pages(folder: Path) -> None:
    """A file for each page, with the blocks one after another. Names may get another type in the
    next block, as in a notebook.
    """
    for page, blocks in CODE_OF_PAGES.items():
        name = re.sub(r"\W", "_", page.removesuffix(".md"))
        code = "\n".join(block for block in blocks if is_installed(block))
        (folder / f"{name}.py").write_text(code, encoding="utf-8")


# Wrong arguments of calls, and an unknown attribute: errors in the lines from 6 on.
WRONG = """
import torch
from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock, Window
from vicinal.detr import FeedForward

block = SparseNeighborhoodAttentionBlock(8, 2, backend="gpu")
block(torch.ones(3, 8))
FeedForward(8)(torch.ones(3, 8)).nothing
Window(3, shape="cube")
FeaturePyramid.from_points(torch.ones(3, 3).long(), torch.ones(3, 8), (8, 8), 1, pooling="min")
"""


def test_pages_pass_a_strict_checker_and_wrong_calls_do_not(tmp_path: Path) -> None:
    """In one run, which reads the types of torch once."""
    write_pages(tmp_path)
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    printed = check(tmp_path)
    *lines, summary = printed.splitlines()
    errors = [line for line in lines if ": note: " not in line]
    found = [re.match(r"wrong\.py:(\d+): error: ", line) for line in errors]
    assert all(found), printed
    assert [int(line[1]) for line in found if line] == [6, 7, 8, 9, 10], printed
    assert f"checked {1 + len(CODE_OF_PAGES)} source files" in summary, printed
