"""Build of the CPU kernel. All other build settings are in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

KERNELS = "src/vicinal/backends/cpu/csrc"


def cpu_kernel() -> list[Extension]:
    """Returns the extension, or none without torch. torch.ops loads it; Python cannot import it."""
    try:
        import torch
    except ImportError:
        print("vicinal: torch is not installed, building without the CPU kernel", file=sys.stderr)
        return []
    if os.name == "nt":
        print("vicinal: the CPU kernel needs GCC or Clang, building without", file=sys.stderr)
        return []
    root = Path(torch.__file__).parent
    return [
        Extension(
            "vicinal.backends.cpu._cpu",
            sources=[f"{KERNELS}/ops.cpp"],
            depends=[str(path) for path in Path(KERNELS).rglob("*.h")],
            include_dirs=[str(root / "include")],
            library_dirs=[str(root / "lib")],
            libraries=["torch_cpu"],
            # PyTorch's stable ABI: a binary built for 2.10 works with all later versions.
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-Wno-psabi",
                "-Wno-ignored-attributes",
            ],
            language="c++",
            py_limited_api=True,
            optional=True,  # without a compiler, the reference back end is used
        )
    ]


setup(
    ext_modules=cpu_kernel(),
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
