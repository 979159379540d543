"""The code on the README and on all pages has types that strict checkers accept: mypy and pyright.

A part of `make lint`, since checkers read the types of torch, which takes long.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from docs.test_docs_code import CODE_OF_PAGES

pytest.importorskip("mypy")
pytest.importorskip("basedpyright")

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
MYPY = f"""[mypy]
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


# The same for pyright: torch leaves parts of its types unknown, such as that of `Tensor.backward`,
# and a page imports in each of its blocks.
PYRIGHT = {
    "typeCheckingMode": "strict",
    "extraPaths": [str(SOURCE)],
    "useLibraryCodeForTypes": False,
    **dict.fromkeys(
        [
            *("reportMissingImports", "reportMissingTypeStubs", "reportMissingModuleSource"),
            *("reportUnknownMemberType", "reportUnknownVariableType", "reportUnknownArgumentType"),
            *("reportUnknownParameterType", "reportPrivateImportUsage", "reportDuplicateImport"),
        ],
        "none",
    ),
}


def run_mypy(folder: Path) -> tuple[list[tuple[str, int]], int, str]:
    """The errors' files and lines, the number of files, and all that mypy prints."""
    (folder / "mypy.ini").write_text(MYPY, encoding="utf-8")
    environment = {**os.environ, "MYPYPATH": str(SOURCE)}
    options = "--config-file", "mypy.ini", "--cache-dir", str(CACHE), "."
    command = [sys.executable, "-m", "mypy", *options]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    errors = re.findall(r"^(.*\.py):(\d+): error: ", run.stdout, re.MULTILINE)
    files = re.search(r"checked (\d+) source files", run.stdout)
    n_files = int(files[1]) if files else 0
    return [(file, int(line)) for file, line in errors], n_files, run.stdout + run.stderr


def run_pyright(folder: Path) -> tuple[list[tuple[str, int]], int, str]:
    """The same of pyright, from a package that brings its JavaScript engine."""
    (folder / "pyrightconfig.json").write_text(json.dumps(PYRIGHT), encoding="utf-8")
    options = "--outputjson", "--pythonpath", sys.executable
    command = [sys.executable, "-m", "basedpyright", *options]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    report = json.loads(run.stdout)
    errors = [
        (Path(found["file"]).name, found["range"]["start"]["line"] + 1)
        for found in report["generalDiagnostics"]
    ]
    return errors, report["summary"]["filesAnalyzed"], run.stdout + run.stderr


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


@pytest.mark.parametrize("check", [run_mypy, run_pyright])
def test_pages_pass_strict_checkers_and_wrong_calls_do_not(
    check: Callable[[Path], tuple[list[tuple[str, int]], int, str]], tmp_path: Path
) -> None:
    """In one run, which reads the types of torch once."""
    write_pages(tmp_path)
    (tmp_path / "wrong.py").write_text(WRONG, encoding="utf-8")
    errors, n_files, printed = check(tmp_path)
    assert sorted(set(errors)) == [("wrong.py", line) for line in range(6, 11)], printed
    assert n_files == 1 + len(CODE_OF_PAGES), printed
