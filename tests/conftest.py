import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

# Without a GPU, Triton's kernels are interpreted: slowly, one program after another. Triton asks
# when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Repeatable, so that a failure is the change's own; no deadline, so that a busy machine is none.
hypothesis.settings.register_profile(
    "vicinal", deadline=None, derandomize=True, database=None, print_blob=False
)
hypothesis.settings.load_profile("vicinal")

# Workers side by side would fight for the processors; what is about threads sets their number.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter") -> None:
    """What compiled kernels take of a card, which their tests tell."""
    reports = terminalreporter.getreports("passed")
    told = [
        value for report in reports for name, value in report.user_properties if name == "kernel"
    ]
    if told:
        terminalreporter.section("Compute capability, kernel, the most that any variant takes")
        terminalreporter.write("\n".join(map(str, told)) + "\n")


@pytest.fixture(scope="session", params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def interpreter_prepares_once() -> Iterator[None]:
    """Triton's interpreter changes its language anew for every function that a kernel calls, which
    takes most of its time; for each kernel is enough.
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
        """For what is called of a package; nobody asks nested calls what they changed."""
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
def uninitialised_is_nan() -> Iterator[None]:
    """Every tensor made without contents is filled with NaN, or with the largest integer."""
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
    """Where Triton is interpreted, a program that sorts takes a third of a second."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr("vicinal.backends.triton.ops.LARGEST_SORT", 0)


@pytest.fixture
def runs_by_triton(runs_by_reference: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of just that."""
    monkeypatch.setattr("vicinal.backends.triton.ops.LARGEST_SORT", 2048)
