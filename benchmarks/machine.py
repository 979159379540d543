"""What the figures were taken on: machine, versions, commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

PACKAGES = (
    "torch",
    "triton",
    "vicinal",
    "torch_geometric",
    "transformers",
    "natten",
    "mlxtend",
    "numpy",
)
ROOT = Path(__file__).parent.parent

Commit = dict[str, str | bool]


def describe_machine() -> dict[str, str | int | float]:
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(_memory("MemTotal") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_gpu() -> dict[str, str | int | float | None]:
    """The current one."""
    found = torch.cuda.get_device_properties()
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "processors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def versions() -> dict[str, str | None]:
    """Of Python and the packages; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        found[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def describe_commit() -> Commit:
    """The commit measured, and whether files git knows of differ from it."""
    commit = _git("rev-parse", "--short=10", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"id": commit or "unknown", "dirty": bool(changes)}


def file_stem(commit: Commit, device: str | None = None) -> str:
    """For the files of a study: device, None for the processor, and commit."""
    name = re.sub(r"[^a-z0-9]+", "-", (device or _processor()).lower()).strip("-")
    return f"{name}-{commit['id']}" + ("-dirty" if commit["dirty"] else "")


def usable_cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that can still be taken without driving others out."""
    return _memory("MemAvailable")


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def _memory(field: str) -> int:
    """Bytes, from /proc/meminfo, which counts in KiB; elsewhere all that is installed."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
        if found:
            return 1024 * int(found[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _git(*arguments: str) -> str:
    return _said_by("git", *arguments)


def _said_by(*command: str) -> str:
    """What a command prints, nothing where it fails or is not there."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return ""
