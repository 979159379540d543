"""Commands of setuptools that compile the CPU kernel, or leave it out and say so.

Without a kernel the package still runs, in plain PyTorch. Such a wheel is tagged ``py3-none-any``,
and a file in the kernel's place holds the reason.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError, PlatformError
from torch_headers import find_torch

CSRC = "src/vicinal/backends/cpu/csrc"
# Those that take longest come first: compilers run at the same time.
SOURCES = ["kernels/avx512", "kernels/avx2", "kernels/baseline", "ops"]
REASON_FILE = "no_kernel.txt"
COMPILER_ARGUMENTS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
]


def cpu_kernel() -> Extension:
    """The extension, which torch.ops loads; Python cannot import it."""
    return Extension(
        "vicinal.backends.cpu._cpu",
        sources=[f"{CSRC}/{name}.cpp" for name in SOURCES],
        depends=sorted(str(path) for path in Path(CSRC).rglob("*.h")),
        libraries=["torch_cpu"],
        # PyTorch's stable ABI: a binary built for 2.10 works with all later versions.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=COMPILER_ARGUMENTS,
        language="c++",
        py_limited_api=True,
    )


class BuildKernel(build_ext):
    """Compiles the kernel. Where that fails, the rest of the build makes a package without it."""

    inplace: bool
    extensions: list[Extension]

    def run(self) -> None:
        inplace = self.inplace
        try:
            self._use_torch()
            super().run()
        except (BaseError, CompileError, LinkError) as error:
            reason = describe(error)
            if kernel_is_required():
                raise PlatformError(f"VICINAL_REQUIRE_KERNEL is set, but {reason}") from error
            self.inplace = inplace  # setuptools forgets it at an error
            self._leave_out(reason)
        else:
            self._reason_file().unlink(missing_ok=True)

    def build_extensions(self) -> None:
        self.compiler.compile = self._at_the_same_time(self.compiler.compile)
        super().build_extensions()

    @staticmethod
    def _at_the_same_time(compile_sources: Callable[..., list[str]]) -> Callable[..., list[str]]:
        """Compiles each source by a call of its own, as many at once as there are processors."""

        def compile_each(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_sources([source], **options), sources)
                return [file for files in objects for file in files]

        return compile_each

    def _use_torch(self) -> None:
        if platform.system() == "Windows":
            raise PlatformError("there is no CPU kernel for Windows")
        torch = find_torch()
        if torch is None:
            raise PlatformError("no torch from 2.10 on was found to compile the CPU kernel with")
        self.include_dirs.append(str(torch / "include"))
        self.library_dirs.append(str(torch / "lib"))

    def _leave_out(self, reason: str) -> None:
        for extension in self.extensions:  # an older kernel may lie in their places
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            Path(self.build_lib, self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        place = self._reason_file()
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(reason, encoding="utf-8")
        self.extensions = []
        self.distribution.ext_modules = []
        self.distribution.no_kernel_reason = reason

    def _reason_file(self) -> Path:
        name = cpu_kernel().name
        return Path(self.get_ext_fullpath(name)).with_name(REASON_FILE)


class PureWithoutKernel(bdist_wheel):
    """Chooses the tag when the kernel was built or left out, which is after options are set."""

    @property
    def root_is_pure(self) -> bool:
        return not self.distribution.has_ext_modules()

    @root_is_pure.setter
    def root_is_pure(self, _: bool) -> None:
        pass


def describe(error: BaseException) -> str:
    """Why there is no kernel, in one line: setuptools would print the whole command."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    if isinstance(first, subprocess.CalledProcessError):
        return f"the C++ compiler {first.cmd[0]!r} failed with exit status {first.returncode}"
    if isinstance(first, FileNotFoundError):
        return f"there is no C++ compiler {first.filename!r}"
    return str(error)


def kernel_is_required() -> bool:
    return os.environ.get("VICINAL_REQUIRE_KERNEL", "0") not in ("", "0")


def report_missing_kernel(distribution: Distribution) -> None:
    """Prints a message if the commands that ran have left the kernel out."""
    reason = getattr(distribution, "no_kernel_reason", None)
    if reason is not None:
        line = "*" * 79
        print(
            f"{line}\nvicinal was built WITHOUT its CPU kernel: {reason}\n"
            "It runs in plain PyTorch, which is slower. A wheel of it is tagged py3-none-any.\n"
            f"With VICINAL_REQUIRE_KERNEL=1 in the environment, this is an error.\n{line}",
            file=sys.stderr,
        )
