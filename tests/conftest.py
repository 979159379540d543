import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from bounds import Checked

# Without a GPU, Triton's kernels are interpreted: slowly, one program after another. Triton reads
# the variable when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Repeatable, so that only a change makes a test fail; no deadline, since the machine may be busy.
hypothesis.settings.register_profile(
    "vicinal", deadline=None, derandomize=True, database=None, print_blob=False
)
hypothesis.settings.load_profile("vicinal")

# Parallel workers would compete for the processors; tests of threads set their number.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter") -> None:
    """Prints the resources of compiled kernels, which their tests record."""
    reports = terminalreporter.getreports("passed")
    lines = [
        value for report in reports for name, value in report.user_properties if name == "kernel"
    ]
    if lines:
        terminalreporter.section("Compute capability, kernel, the largest use of any variant")
        terminalreporter.write("\n".join(map(str, lines)) + "\n")


@pytest.fixture(scope="session", params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def interpreter_prepares_once() -> Iterator[None]:
    """Makes Triton's interpreter patch its language once per kernel and package.

    It patches it for every function that a kernel calls, which takes most of its time.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    run, prepare = interpreter.GridExecutor.__call__, interpreter._patch_lang
    done: set[str] = set()

    def run_kernel(self: Any, *arguments: Any, **options: Any) -> None:
        done.clear()
        run(self, *arguments, **options)

    def prepare_once(function: Any) -> Any:
        """Patches for the first function of a package; nested calls restore nothing themselves."""
        package = function.__module__.partition(".")[0]
        if package in done:
            return None
        done.add(package)
        return prepare(function)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(interpreter.GridExecutor, "__call__", run_kernel)
        patches.setattr(interpreter, "_patch_lang", prepare_once)
        yield


@pytest.fixture
def uninitialized_is_nan() -> Iterator[None]:
    """Fills every uninitialized tensor with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def runs_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds runs by the reference where Triton is interpreted: a program that sorts is slow."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr("vicinal.backends.triton.plan_ops.LARGEST_SORT", 0)


@pytest.fixture
def runs_by_triton(runs_by_reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds runs by the Triton kernel, for tests of that kernel."""
    monkeypatch.setattr("vicinal.backends.triton.plan_ops.LARGEST_SORT", 2048)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Checked | None:
    """The checking interpreter; None on a GPU, where `test_gpu` runs compute-sanitizer."""
    import triton.runtime.interpreter as interpreter

    from vicinal.backends.triton import ops, plan_ops
    from vicinal.backends.triton.launch import launch

    if not ops.INTERPRETS:
        return None
    checked = Checked(interpreter._interpreter)

    def checked_launch(kernel: Any, n_programs: int, *arguments: Any, **options: Any) -> None:
        checked.allow(arguments)
        launch(kernel, n_programs, *arguments, **options)

    monkeypatch.setattr(interpreter, "_interpreter", checked)
    for module in (ops, plan_ops):
        monkeypatch.setattr(module, "launch", checked_launch)
    return checked
