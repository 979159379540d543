"""What this installation can run, for bug reports."""

import os
import platform
import sys
from pathlib import Path
from typing import TextIO

import torch

from ._version import __version__
from .backends import cpu, triton, unsupported_reasons


def show_config(file: TextIO | None = None) -> None:
    """Prints versions, the back ends that can run and why others cannot, and the processor's use.

    It imports Triton, if that is installed. Paste what it prints into a bug report.

    Args:
        file: Where it prints; None, the default, is standard output.

    Example:
        ```python
        import vicinal

        vicinal.show_config()
        ```
    """
    rows = {
        "vicinal": f"{__version__} in {Path(__file__).parent}",
        "torch": f"{torch.__version__}, {_gpu_platform()}",
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "Triton": triton.version() or f"none: {triton.install_error()}",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": f"{torch.get_num_threads()} of torch, {os.cpu_count()} processors",
        "instruction set": cpu.instruction_set() or "none: there is no CPU kernel",
    }
    for name, reason in unsupported_reasons().items():
        rows[f"backend {name!r}"] = "can run" if reason is None else f"cannot run: {reason}"
    for label, text in rows.items():
        print(f"{label:20}{text}", file=sys.stdout if file is None else file)


def _gpu_platform() -> str:
    if torch.version.cuda is not None:
        return f"built for CUDA {torch.version.cuda}"
    if torch.version.hip is not None:
        return f"built for ROCm {torch.version.hip}"
    return "built without CUDA and ROCm"
