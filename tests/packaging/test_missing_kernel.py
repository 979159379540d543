"""Without a kernel, the first use warns once, at the user's line, with the real reason."""

import _thread
import ctypes
import platform
import shutil
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import run_python

import vicinal
from vicinal import SparseNeighborhoodAttentionBlock, backends
from vicinal._utils.user_warnings import warn_user
from vicinal.backends import cpu, reference, triton
from vicinal.backends.cpu import library

PACKAGE = Path(vicinal.__file__).parent


def folder_of_kernel(packages: Path) -> Path:
    """Where the kernel lies in a copy of the package's first folders; they are made empty."""
    folder = packages / "vicinal" / "backends" / "cpu"
    folder.mkdir(parents=True)
    return folder


def install_metadata(packages: Path, *, pure: bool) -> None:
    info = packages / "vicinal-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: vicinal\nVersion: 0.1.0\n")
    (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: {str(pure).lower()}\n")


# --------------------------------------------------------------------------- reasons


def test_a_source_folder_says_that_the_kernel_was_not_built(tmp_path: Path) -> None:
    reason = library.missing_reason(folder_of_kernel(tmp_path))
    assert "not built" in reason
    assert "wheel" not in reason


def test_a_pure_wheel_says_so_and_names_the_platform(tmp_path: Path) -> None:
    folder = folder_of_kernel(tmp_path)
    install_metadata(tmp_path, pure=True)
    reason = library.missing_reason(folder)
    assert "wheel" in reason
    assert platform.system() in reason
    assert platform.machine() in reason
    (folder / "no_kernel.txt").write_text("the compiler was on holiday\n")
    assert "the compiler was on holiday;" in library.missing_reason(folder)


def test_metadata_of_a_wheel_with_a_kernel_is_not_blamed(tmp_path: Path) -> None:
    folder = folder_of_kernel(tmp_path)
    install_metadata(tmp_path, pure=False)
    assert "wheel" not in library.missing_reason(folder)


def test_windows_has_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert "Windows" in library.missing_reason(folder_of_kernel(tmp_path))


@pytest.mark.parametrize(
    ("machine", "named"),
    [("x86_64", "AArch64"), ("AMD64", "AArch64"), ("aarch64", "x86-64"), ("arm64", "x86-64")],
)
@pytest.mark.parametrize("system", ["Linux", "Linux, big-endian", "Darwin"])
def test_a_kernel_for_another_architecture_is_named(
    machine: str, named: str, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    if system == "Darwin":
        head = struct.pack("<II", 0xFEEDFACF, {"AArch64": 0x0100000C, "x86-64": 0x01000007}[named])
    else:
        order = ">" if "big" in system else "<"
        number = struct.pack(f"{order}H", {"AArch64": 183, "x86-64": 62}[named])
        head = b"\x7fELF\x02" + (b"\x02" if "big" in system else b"\x01") + bytes(12) + number
    file = tmp_path / "_cpu.abi3.so"
    file.write_bytes(head + bytes(100))
    reason = library.load_failure(file, OSError("no such file"))
    assert f"built for {named}" in reason
    assert "no such file" in reason


@pytest.mark.parametrize("content", [b"", b"text", b"\x7fELF", bytes(100), b"\x7fELF" * 30])
def test_any_other_file_is_reported_by_the_loader(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "_cpu.abi3.so"
    file.write_bytes(content)
    reason = library.load_failure(file, OSError("file too short"))
    assert "file too short" in reason
    assert "built for" not in reason


def test_what_the_loader_says_is_repeated(tmp_path: Path) -> None:
    file = tmp_path / "_cpu.abi3.so"
    file.write_text("no library, but long enough to have a header" * 10)
    with pytest.raises(OSError, match="_cpu") as raised:
        torch.ops.load_library(str(file))
    with pytest.raises(OSError, match="_cpu") as of_loader:
        ctypes.CDLL(str(file))
    assert str(of_loader.value) in library.load_failure(file, raised.value)


def test_the_kernel_here_is_for_this_architecture() -> None:
    file = library.find_library()
    assert file is not None
    assert "built for" not in library.load_failure(file, OSError("something else"))


def test_the_loader_of_this_machine_refuses_a_foreign_kernel(tmp_path: Path) -> None:
    file = library.find_library()
    assert file is not None
    ignored = shutil.ignore_patterns("_cpu*.so", "__pycache__")
    copy = Path(shutil.copytree(PACKAGE, tmp_path / "vicinal", ignore=ignored))
    content = bytearray(file.read_bytes())
    if content[:4] != b"\x7fELF":
        pytest.skip("not an ELF file")
    struct.pack_into("<H", content, 18, 243)
    (copy / "backends" / "cpu" / "_cpu.abi3.so").write_bytes(content)
    code = "import vicinal; vicinal.show_config()"
    rows = run_python(code, path=tmp_path).splitlines()
    row = next(row for row in rows if row.startswith("backend 'cpu'"))
    assert "cannot run" in row
    assert "built for RISC-V" in row


# --------------------------------------------------------------------------- the user's line

SCRIPT = """\
import vicinal

def build():
    return vicinal.SparseNeighborhoodAttentionBlock(8, 2, 1, [3])  # the line

import functools
build()
build()
"""


def test_the_warning_names_the_line_that_made_the_module(tmp_path: Path) -> None:
    shutil.copytree(
        PACKAGE, tmp_path / "vicinal", ignore=shutil.ignore_patterns("_cpu*.so", "__pycache__")
    )
    script = tmp_path / "user.py"
    script.write_text(SCRIPT)
    finished = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True
    )
    line = SCRIPT.splitlines().index(next(x for x in SCRIPT.splitlines() if "the line" in x)) + 1
    assert f"{script}:{line}: RuntimeWarning" in finished.stderr
    assert finished.stderr.count("RuntimeWarning") == 1
    assert "not built" in finished.stderr


def test_frames_of_torch_and_of_the_package_are_skipped() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile("module()", "users_file.py", "exec"), {"module": library_module()})
    assert [warning.filename for warning in caught] == ["users_file.py"]
    assert caught[0].lineno == 1


def library_module() -> torch.nn.Module:
    """A module whose code claims to lie in the package; it warns when it is called."""
    path = str(PACKAGE / "nn" / "invented.py")
    namespace: dict[str, Any] = {"torch": torch, "warn": warn_user}
    source = "class Of(torch.nn.Module):\n    def forward(self): warn('deep', UserWarning)"
    exec(compile(source, path, "exec"), namespace)
    made = namespace["Of"]()
    assert isinstance(made, torch.nn.Module)
    return made


def test_a_warning_is_subject_to_the_filters_of_the_users_module() -> None:
    source = "import torch\nwarn('once', UserWarning)\n"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="a_user")
        user = {"warn": warn_user, "__name__": "a_user"}
        for _ in range(2):
            exec(compile(source, "a_user.py", "exec"), user)
        other = {"warn": warn_user, "__name__": "another"}
        exec(compile(source, "another.py", "exec"), other)
    assert [warning.filename for warning in caught] == ["a_user.py"]


def test_a_thread_without_a_line_of_the_user_warns_too() -> None:
    code = compile("warn('x', UserWarning)", str(PACKAGE / "invented.py"), "exec")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _thread.start_new_thread(exec, (code, {"warn": warn_user}))
        deadline = time.monotonic() + 10
        while not caught and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(caught) == 1


def test_positions_in_the_unit_interval_warn_at_the_users_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vicinal import windows

    monkeypatch.setattr(windows, "_warned_normalized", set())
    block = SparseNeighborhoodAttentionBlock(8, 2, 1, [3])
    pyramid = vicinal.FeaturePyramid(
        torch.zeros(20, 8), torch.tensor([[0, i, i, 0] for i in range(20)]), ((20, 20),), 1
    )
    with pytest.warns(UserWarning, match=r"\[0, 1\]") as caught:
        block(torch.zeros(20, 8), torch.rand(20, 2), torch.tensor([0, 20]), pyramid)
    assert {warning.filename for warning in caught} == {__file__}


def test_only_what_the_installation_lacks_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(device: torch.device, dtype: torch.dtype | None) -> str:
        return "no float64" if dtype == torch.float64 else "no Triton"

    broken = triton.BACKEND._replace(
        unsupported_reason=unsupported, install_error=lambda: "no Triton"
    )
    monkeypatch.setitem(backends._BACKENDS, "triton", broken)
    backends._warn_once.cache_clear()
    gpu = torch.device("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose_backend(None, gpu, torch.float64) is reference.BACKEND
        with pytest.raises(ValueError, match="no Triton"):
            backends.choose_backend("triton", gpu, torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert backends.choose_backend(None, gpu, torch.float32) is reference.BACKEND
    assert ["no Triton" in str(warning.message) for warning in caught] == [True]
    assert [warning.filename for warning in caught] == [__file__]


def test_the_installed_back_end_has_no_install_error() -> None:
    assert cpu.install_error() is None
    assert cpu.instruction_set()
