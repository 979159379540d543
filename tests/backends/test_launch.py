"""Launches: Triton binds the arguments of a kernel once for each variant that it compiles."""

import importlib.util
import json
import sys
from typing import Any, NamedTuple

import pytest
import torch
from compilers import compile_for_gpus
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from vicinal.backends.triton import launch as launching
from vicinal.backends.triton.launch import launch, specialization


class Pair(NamedTuple):
    data: Tensor
    stride: int


class Kernel:
    """A kernel of Triton as `launch` sees it: it records what compiles and what runs."""

    arg_names = ("data", "size", "WIDTH", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.runs: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.compiled.append((grid, arguments, options))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.runs.append((grid, arguments))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(launching, "INTERPRETS", False)
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def test_arguments_are_bound_once(kernel: Kernel) -> None:
    x = torch.zeros(64)
    for size in (5, 7, 9):  # none of them one or a multiple of 16
        launch(kernel, size, Pair(x, 3), size, num_warps=2, BLOCK=32, WIDTH=8)
    options = {"WIDTH": 8, "BLOCK": 32, "num_warps": 2, "enable_fp_fusion": True}
    assert kernel.compiled == [((5,), (Pair(x, 3), 5), options)]
    # Constants are in the order of the kernel's parameters.
    assert kernel.runs == [((n, 1, 1), (Pair(x, 3), n, 8, 32)) for n in (7, 9)]


@pytest.mark.parametrize(
    "change", ["dtype", "address", "stride", "size", "WIDTH", "num_warps", "none", "device"]
)
def test_what_triton_specializes_on_is_bound_again(
    kernel: Kernel, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, size, stride = torch.zeros(64), 5, 3
    constants = {"WIDTH": 8, "BLOCK": 32, "num_warps": 2}
    launch(kernel, 1, Pair(x, stride), size, **constants)
    first: Any = Pair(x, stride)
    if change == "dtype":
        first = Pair(x.half(), stride)
    elif change == "address":
        first = Pair(x[1:], stride)
    elif change == "stride":
        first = Pair(x, 32)
    elif change == "size":
        size = 2**31
    elif change == "none":
        first = None
    elif change == "device":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    else:
        constants[change] = 4
    launch(kernel, 1, first, size, **constants)
    assert len(kernel.compiled) == 2
    launch(kernel, 1, first, size, **constants)
    assert len(kernel.compiled) == 2
    assert len(kernel.runs) == 1


def test_no_programs_are_no_launch(kernel: Kernel) -> None:
    launch(kernel, 0, torch.zeros(3), 5, num_warps=1, WIDTH=8, BLOCK=32)
    assert kernel.compiled == kernel.runs == []


def test_parameters_are_tensors() -> None:
    x = torch.nn.Parameter(torch.zeros(4))
    assert specialization((x,)) == specialization((x.detach(),))


# Arguments that `specialization` does not tell apart are the same to Triton.
COMPARE = """
import itertools, json, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from benchmarks.kernels import Case, launches
from vicinal.backends.triton import launch as launching

def variations(x):
    if isinstance(x, torch.Tensor):
        wide = torch.zeros(x.numel() + 16, dtype=x.dtype)
        return [x, *(wide[i : i + x.numel()].view(x.shape) for i in (0, 1, 2, 4, 8, 16)),
                x.to(torch.float16), x.to(torch.int64),
                torch.empty(2**31 // x.element_size(), dtype=x.dtype, device="meta")]
    if isinstance(x, bool):
        return [x]
    if isinstance(x, int):
        return [0, 1, 2, 15, 16, 48, -16, 2**31 - 1, 2**31, 2**31 + 16, 2**40, 2**63 - 1]
    if isinstance(x, float):
        return [x, 0.0, 1.0, 2.5]
    if isinstance(x, tuple):
        fields = [variations(y) for y in x]
        return [type(x)(*(field[i % len(field)] for field in fields)) for i in range(12)]
    return [x]

found = {}
for case in (Case(torch.bfloat16, 32, everything=False), Case(torch.float16, 32)):
    for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        backend, launching.ON_AMD = make_backend(target), target.backend == "hip"
        for launch in launches(case):
            kernel, n = launch.kernel, 0
            bind = create_function_from_signature(kernel.signature, kernel.params, backend)
            seen = {}
            for index, x in enumerate(launch.arguments):
                for other in variations(x):
                    arguments = list(launch.arguments)
                    arguments[index] = other
                    _, special, _ = bind(*arguments, **launch.options)
                    key = launching.specialization(tuple(arguments))
                    assert seen.setdefault(key, str(special)) == str(special), kernel
                    n += 1
            found[kernel.fn.__name__] = n
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has no back ends there")
def test_specializations_are_at_least_as_fine_as_those_of_triton() -> None:
    (found,) = compile_for_gpus(COMPARE)
    assert len(json.loads(found)) > 10
