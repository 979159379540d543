"""`vicinal.show_config`: what can run, and why the rest cannot."""

import contextlib
import io
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from problems import run_python
from started import run_light

import vicinal
from vicinal import backends, show_config


def printed() -> dict[str, str]:
    """The rows that it prints, by their labels."""
    out = io.StringIO()
    show_config(out)
    return {line[:20].strip(): line[20:] for line in out.getvalue().splitlines()}


def test_it_prints_to_standard_output_by_default() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert show_config() is None  # type: ignore[func-returns-value]
    assert out.getvalue().split()[0] == "vicinal"


def test_it_names_versions_and_threads(restored_threads: None) -> None:
    torch.set_num_threads(1)
    rows = printed()
    assert rows["vicinal"].startswith(vicinal.__version__)
    assert rows["torch"].startswith(torch.__version__)
    assert rows["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert rows["threads"].startswith("1 ")


def test_it_names_every_back_end_and_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = printed()
    assert rows["backend 'reference'"] == rows["backend 'cpu'"] == "can run"
    broken = backends._BACKENDS["cpu"]._replace(unsupported_reason=lambda device, dtype: "so it is")
    monkeypatch.setitem(backends._BACKENDS, "cpu", broken)
    assert printed()["backend 'cpu'"] == "cannot run: so it is"


def test_its_reasons_are_those_of_the_refusals() -> None:
    for name, reason in backends.unsupported_reasons().items():
        device = torch.device("cuda" if torch.cuda.is_available() and name == "triton" else "cpu")
        if reason is None:
            assert backends.choose_backend(name, device)
        else:
            with pytest.raises(ValueError, match=re.escape(reason)):
                backends.choose_backend(name, device)


def show_config_to(log: Path, capability: str) -> None:
    """For processes in which no op has run: the kernel decides at its first."""
    os.environ["ATEN_CPU_CAPABILITY"] = capability
    warnings.simplefilter("error")
    with log.open("w") as file, contextlib.redirect_stdout(file):
        show_config()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_it_names_the_instruction_set_in_use(capability: str, tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the processor has one instruction set")
    log = tmp_path / "log"
    assert run_light(show_config_to, log, capability) == 0
    lines = log.read_text().splitlines()
    line = next(line for line in lines if line.startswith("instruction set"))
    assert ("AVX2" in line) == (capability == "avx2")
    assert ("baseline" in line) == (capability == "default")


def test_it_tells_of_a_triton_that_is_missing() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else find(name, *more)
import vicinal
vicinal.show_config()
"""
    rows = [line for line in run_python(code).splitlines() if "riton" in line[:20]]
    assert len(rows) == 2
    assert all("not installed" in row for row in rows)


def test_it_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = backends._BACKENDS["cpu"]._replace(
        unsupported_reason=lambda device, dtype: "no", install_error=lambda: "no"
    )
    monkeypatch.setitem(backends._BACKENDS, "cpu", broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        show_config(io.StringIO())
