"""Triton's interpreter with less work of its own computes the same bits."""

import hashlib
import os

import pytest
import torch
from problems import answer, make_inputs, run_python, scene_2d

from vicinal.backends import choose_backend

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton's kernels are not interpreted", allow_module_level=True)

# Without the fixtures of conftest.py; NumPy warns of numbers that kernels mask.
UNCHANGED = """
import warnings
warnings.simplefilter("ignore")
import test_faster_interpreter
from vicinal.backends.triton import plan_ops
plan_ops.LARGEST_SORT = 0
print(*test_faster_interpreter.hashes())
"""


def hashes() -> list[str]:
    """Of output, log-sum-exp and all gradients in float16."""
    torch.manual_seed(0)
    choose_backend("triton", torch.device("cpu"), torch.float16)
    plan = scene_2d(n_queries=6, n_points=12).plan()
    inputs = make_inputs(plan, heads=1, background=True, bias=True)
    found = answer(inputs.map(lambda x: x.half()), plan, "triton", dropout_p=0.4)
    results = (found.out, found.lse, *found.grads)
    return [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in results]


@pytest.mark.usefixtures("runs_by_reference")
@pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")
def test_it_computes_the_same_bits() -> None:
    found = hashes()
    assert run_python(UNCHANGED).split() == found
    assert len(set(found)) > 5  # results that differ
