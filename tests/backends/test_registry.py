"""The registry of back ends: which one is chosen, and why another cannot run."""

import pytest
import torch

from vicinal import backends
from vicinal._utils.types import BackendName
from vicinal.backends import cpu, reference, triton
from vicinal.backends.types import Backend

CPU, META, CUDA, MPS = (torch.device(name) for name in ("cpu", "meta", "cuda", "mps"))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16])
def test_the_default_on_the_cpu_is_the_compiled_kernel(dtype: torch.dtype | None) -> None:
    assert backends.choose_backend(None, CPU, dtype) is cpu.BACKEND


def test_the_default_on_a_device_without_kernels_is_the_reference() -> None:
    assert backends.choose_backend(None, MPS, torch.float32) is reference.BACKEND


def test_meta_tensors_get_the_shapes_of_the_compiled_kernel() -> None:
    assert backends.choose_backend(None, META, torch.float32) is cpu.BACKEND


def replace(name: BackendName, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setitem(backends._BACKENDS, name, backend)
    return backend


def test_the_default_on_a_gpu_depends_on_dtype_and_head_dim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    able = triton.BACKEND._replace(
        unsupported_reason=lambda _, dtype: "no float64" if dtype == torch.float64 else None,
        max_head_dim=256,
    )
    replace("triton", able, monkeypatch)
    assert backends.choose_backend(None, CUDA, torch.float32, 256) is able
    assert backends.choose_backend("triton", CUDA, torch.float32, 256) is able
    assert backends.choose_backend(None, CUDA, torch.float64, 16) is reference.BACKEND
    assert backends.choose_backend(None, CUDA, torch.float32, 257) is reference.BACKEND
    with pytest.raises(ValueError, match=r"^backend: .*cuda.*'triton'.*no float64"):
        backends.choose_backend("triton", CUDA, torch.float64)
    with pytest.raises(ValueError, match=r"^backend: .*'triton'.*256"):
        backends.choose_backend("triton", CUDA, torch.float32, 257)


def test_the_default_is_the_reference_where_the_kernel_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = cpu.BACKEND._replace(unsupported_reason=lambda device, dtype: "not built")
    replace("cpu", broken, monkeypatch)
    assert backends.choose_backend(None, CPU) is reference.BACKEND
    with pytest.raises(ValueError, match=r"^backend: .*'cpu'.*not built"):
        backends.choose_backend("cpu", CPU)


@pytest.mark.parametrize("device", [CPU, META, CUDA])
def test_the_reference_runs_on_any_device(device: torch.device) -> None:
    for dtype in (torch.float16, torch.float64):
        assert backends.choose_backend("reference", device, dtype, 4096) is reference.BACKEND


def test_the_cpu_back_end_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match=r"^backend: .*mps.*'cpu'.*CPU"):
        backends.choose_backend("cpu", MPS)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    for name in (None, "reference", "cpu", "triton"):
        backends.check_backend(name)
    for refuses in (backends.check_backend, lambda name: backends.choose_backend(name, CPU)):
        with pytest.raises(ValueError, match=r"^backend: ") as refusal:
            refuses("cuda")  # type: ignore[arg-type]
        for part in ("reference", "cpu", "triton", "got cuda"):
            assert part in str(refusal.value)
