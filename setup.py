"""Build of the CPU kernel, and the description. All other settings are in pyproject.toml."""

import sys
import sysconfig
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "build_backend"))
from kernel_commands import BuildKernel, PureWithoutKernel, cpu_kernel, report_missing_kernel
from readme import DescribeByReadme

# Builds of Python without the GIL have no stable ABI before 3.15.
ABI3 = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp310"}

report_missing_kernel(
    setup(
        ext_modules=[cpu_kernel()],
        cmdclass={
            "build_ext": BuildKernel,
            "bdist_wheel": PureWithoutKernel,
            "egg_info": DescribeByReadme,
        },
        options={"bdist_wheel": ABI3},
    )
)
