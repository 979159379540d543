"""Every kernel under NVIDIA's Compute Sanitizer: `make gpu-sanitize`, which takes many minutes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def sanitize(tool: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs Python under NVIDIA's Compute Sanitizer, whose reports become an exit code of 7."""
    checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(checker).exists():
        pytest.skip("compute-sanitizer is not installed")
    # Calls that fail may be PyTorch's own queries of the device.
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return subprocess.run(
        [checker, "--tool", tool, *quiet, "--error-exitcode", "7", sys.executable, *command],
        # Each tensor in an allocation of its own, so that reads beyond its end are errors.
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    """Good contents, bad ones and plans of garbage, every kernel."""
    folder = Path(__file__).parent
    watched = [
        f"{folder / 'test_triton.py'}::test_kernels_stay_in_their_buffers",
        f"{folder / 'test_triton.py'}::test_forged_plans_stay_in_their_buffers",
        f"{folder / 'test_triton_plan.py'}::test_ops_of_forged_contents_stay_in_their_buffers",
        f"{folder.parent / '_index' / 'test_sampling.py'}::test_bad_tables_in_triton",
    ]
    done = sanitize(tool, "-m", "pytest", "-q", "-p", "no:cacheprovider", *watched)
    assert done.returncode == 0, done.stdout[-3000:]


OVERRUN = """
import torch
from vicinal.backends.triton import gradients
from vicinal.backends.triton.launch import heads, launch

x = torch.zeros({allocated}, 1, 16, device="cuda")
lse, stats = (torch.zeros({allocated}, 2, device="cuda") for _ in range(2))
launch(
    gradients.find_stats, {given} // 32, heads(x), heads(x), lse, lse, stats, {given}, 1,
    VALUE_WIDTH=16, VALUE_PADDED=16, BLOCK=32, num_warps=1,
)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(("given", "reported"), [(64, False), (96, True)])
def test_compute_sanitizer_notices(given: int, reported: bool) -> None:
    """The sanitizer itself: it reports a kernel that is given more rows than were allocated."""
    done = sanitize("memcheck", "-c", OVERRUN.format(allocated=64, given=given))
    assert (done.returncode == 7) == reported, done.stdout[-3000:]
    assert ("out of bounds" in done.stdout) == reported
