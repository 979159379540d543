"""Triton's kernels compiled ahead of time, for cards that need not be there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = """
import json, sys
from benchmarks.kernels import CASES, usages

for case in CASES:
    for usage in usages(case, int(sys.argv[1])):
        allowed = case.spills_allowed(usage.kernel)
        print(json.dumps([str(case), allowed, usage._asdict()]))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="needs NVIDIA's assembler")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_compile_and_hardly_spill(architecture: int, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE, str(architecture)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {usage["kernel"] for _, _, usage in lines}
    assert kernels == {
        "attend",
        "query_gradients",
        "point_gradients",
        "find_flags",
        "cell_key_gradients",
        "cell_value_gradients",
        "find_slices",
        "find_runs",
        "rotate",
        "rotate_backward",
    }
    spilling = [line for line in lines if line[2]["spilled_bytes"] > line[1]]
    assert not spilling
    for _, _, usage in lines:
        print(usage)  # shown by pytest -rP
