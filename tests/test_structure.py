"""The structure of the package: light import, imports without cycles, no private parts of torch."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from problems import run_python

import vicinal

SOURCE = Path(vicinal.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
MAX_FILES = 16  # in one folder
LAYERS = [  # each may import those before it
    ("_version", "_utils"),
    ("window_shapes",),
    ("windows",),
    ("backends",),
    ("config",),
    ("pooling",),
    ("_pyramid",),
    ("pyramid",),
    ("voxels",),
    ("_index",),
    ("placement",),
    ("_plan",),
    ("plan",),
    ("suggest",),
    ("batching",),
    ("attention",),
    ("nn",),
    ("detr",),
    ("nets",),
    ("distributed",),
    ("interop",),
    ("visualize",),
]
# What reads private names of torch, and works without them.
GUARDED = {"nn/projections.py", "batching.py"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported_modules(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports anywhere, TYPE_CHECKING blocks included."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        target = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
        for alias in node.names:
            inner = f"{target}.{alias.name}"
            yield inner if inner in MODULES else target


def test_importing_is_light() -> None:
    heavy = ("torch._dynamo", "torch._inductor", "triton", "scipy", "matplotlib", "sympy")
    code = f"""
import sys, torch
before = set(sys.modules)
import vicinal, vicinal.detr, vicinal.distributed, vicinal.interop, vicinal.nets, vicinal.visualize
print([name for name in {heavy} if name in sys.modules and name not in before])
"""
    assert run_python(code).strip() == "[]"


def test_imports_have_no_cycles() -> None:
    graph = {name: set(imported_modules(path)) - {name} for name, path in MODULES.items()}
    # A package imports its modules to export them; importing one of them runs the package first.
    for name, targets in graph.items():
        graph[name] = {target for target in targets if not name.startswith(f"{target}.")}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) >= set(MODULES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    top = path.relative_to(SOURCE).with_suffix("").parts[0]
    if top == "__init__":
        return
    for target in imported_modules(path):
        parts = target.split(".")
        assert len(parts) > 1, "a module imports the whole package"
        assert level[parts[1]] <= level[top], target


def test_back_ends_do_not_import_each_other() -> None:
    for name, path in MODULES.items():
        for backend, other in (("cpu", "triton"), ("triton", "cpu")):
            if name.startswith(f"vicinal.backends.{backend}"):
                targets = list(imported_modules(path))
                assert not [t for t in targets if t.startswith(f"vicinal.backends.{other}")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_private_names_of_torch(path: Path) -> None:
    if str(path.relative_to(SOURCE)) in GUARDED:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.", "nn.")):
            names = ast.unparse(node).split(".")
        else:
            continue
        private = [name for name in names if name.startswith("_") and not name.startswith("__")]
        assert not private, f"line {node.lineno}: {private}"


def test_folders_are_small() -> None:
    folders = {path for path in SOURCE.rglob("*") if path.is_dir() and path.name != "__pycache__"}
    counts = {
        str(folder.relative_to(SOURCE)): len(
            [file for file in folder.iterdir() if file.is_file() and file.suffix != ".so"]
        )
        for folder in {SOURCE, *folders}
    }
    assert not {folder: count for folder, count in counts.items() if count > MAX_FILES}
