"""Builds use the headers of a torch that is installed, and ask for one only where there is none."""

import importlib.util
import os
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import vicinal_build_meta
from torch_headers import find_torch

BUILD_BACKEND = Path(__file__).parents[2] / "build_backend"
PACKAGES = "lib/python3.12/site-packages"
VARIABLES = ("VICINAL_TORCH", "VIRTUAL_ENV", "CONDA_PREFIX", "UV_PROJECT_ENVIRONMENT", "PATH")


def fake_torch(packages: Path, version: str = "2.10.0+cpu") -> Path:
    """A torch of that version that consists of its headers."""
    header = packages / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (packages / "torch/version.py").write_text(f"__all__ = []\n__version__ = '{version}'\n")
    return packages / "torch"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, on a machine that has no torch."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(empty))
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(empty))
    monkeypatch.setattr(sys, "base_prefix", str(empty))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(empty)
    monkeypatch.setenv("PWD", str(empty))
    assert find_torch() is None
    return empty


def test_the_torch_of_this_environment_is_found() -> None:
    found = find_torch()
    assert found is not None
    assert (found / "include").is_dir()


def test_a_build_that_is_isolated_by_pip_finds_the_torch_of_its_environment(
    tmp_path: Path,
) -> None:
    # pip runs the environment's Python and takes the folder of packages off its path.
    code = """
import sys
sys.path[:] = [path for path in sys.path if "site-packages" not in path]
import torch_headers
print("torch" in sys.modules, torch_headers.find_torch())
"""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(BUILD_BACKEND), "PWD": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.strip() == f"False {find_torch()}"


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX", "UV_PROJECT_ENVIRONMENT"])
def test_environments_that_variables_name_are_searched(
    variable: str, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = fake_torch(bare / "env" / PACKAGES)
    monkeypatch.setenv(variable, str(bare / "env"))
    assert find_torch() == torch


def test_environments_on_the_path_are_searched(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = fake_torch(bare / "env" / PACKAGES)
    monkeypatch.setenv("PATH", os.pathsep.join(["/nowhere/bin", str(bare / "env" / "bin")]))
    assert find_torch() == torch


def test_an_environment_beside_the_work_is_found(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = bare / "project"
    torch = fake_torch(project / ".venv" / PACKAGES)
    (project / "notebooks").mkdir()
    assert find_torch() is None
    monkeypatch.setenv("PWD", str(project / "notebooks"))  # where the shell is
    assert find_torch() == torch
    monkeypatch.setenv("PWD", str(bare))
    monkeypatch.chdir(project)
    assert find_torch() == torch


def test_a_torch_can_be_named(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", str(bare / "env"))
    fake_torch(bare / "env" / PACKAGES)
    torch = fake_torch(bare / "elsewhere")
    monkeypatch.setenv("VICINAL_TORCH", str(torch))
    assert find_torch() == torch
    monkeypatch.setenv("VICINAL_TORCH", str(bare))
    with pytest.raises(FileNotFoundError, match="VICINAL_TORCH"):
        find_torch()


@pytest.mark.parametrize(
    ("version", "serves"),
    [("2.9.1+cu128", False), ("1.13.0", False), ("2.10.0a0", True), ("3.0.0", True), ("?", False)],
)
def test_only_a_torch_with_the_stable_abi_serves(
    version: str, serves: bool, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_torch(bare / "env" / PACKAGES, version)
    monkeypatch.setenv("VIRTUAL_ENV", str(bare / "env"))
    assert (find_torch() is not None) == serves


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_build_asks_for_torch_only_where_there_is_none(
    kind: str, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bare / "setup.py").write_text("from setuptools import setup; setup()")
    hook = getattr(vicinal_build_meta, f"get_requires_for_build_{kind}")
    assert [r for r in hook() if r.startswith("torch")] == ["torch>=2.10"]
    fake_torch(bare / "env" / PACKAGES)
    monkeypatch.setenv("VIRTUAL_ENV", str(bare / "env"))
    assert [r for r in hook() if r.startswith("torch")] == []


def test_an_sdist_needs_no_torch(bare: Path) -> None:
    (bare / "setup.py").write_text("from setuptools import setup; setup()")
    assert not [r for r in vicinal_build_meta.get_requires_for_build_sdist() if "torch" in r]
