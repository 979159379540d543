"""What the figures were taken on: machine, versions, commit."""

import contextlib
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "vicinal", "torch_geometric", "transformers", "mlxtend", "numpy")
ROOT = Path(__file__).parent.parent


def describe_machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(proc_bytes("meminfo", "MemTotal") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_gpu() -> dict[str, Any]:
    found = torch.cuda.get_device_properties()
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "processors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "toolkit": torch.version.cuda or torch.version.hip,
    }


def versions() -> dict[str, str | None]:
    """Of Python and the packages; None for what is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def describe_commit() -> dict[str, str | bool]:
    """The commit measured, whether tracked files differ from it, and a hash of what is measured."""
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    commit = _output("git", "rev-parse", "--short=10", "HEAD")
    sources = hashlib.sha256()
    for folder in ("src/vicinal", "benchmarks"):
        files = (ROOT / folder).rglob("*")
        for file in sorted(file for file in files if file.suffix in (".py", ".cpp", ".h")):
            sources.update(file.read_bytes())
    described: dict[str, str | bool] = {"id": commit or "unknown", "dirty": bool(changes)}
    return described | {"sources": sources.hexdigest()[:10]}


def file_stem(commit: Mapping[str, str | bool], device: str | None = None) -> str:
    """For the files of a study: device, None for the processor, and commit."""
    name = re.sub(r"[^a-z0-9]+", "-", (device or _processor()).lower()).strip("-")
    return f"{name}-{commit['id']}" + ("-dirty" if commit["dirty"] else "")


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def proc_bytes(file: str, field: str) -> int:
    """A field of a file in /proc, which counts in KiB; 0 where there is none."""
    return 1024 * int(_proc(file, rf"^{field}:\s*(\d+) kB$") or 0)


def _processor() -> str:
    return _proc("cpuinfo", r"^model name\s*:\s*(.+)$") or platform.processor() or "unknown"


def _proc(file: str, pattern: str) -> str:
    with contextlib.suppress(OSError):
        found = re.search(pattern, Path("/proc", file).read_text(), re.M)
        return found[1].strip() if found else ""
    return ""


def _output(*command: str) -> str:
    """What a command prints; nothing where it fails or does not exist."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return ""
