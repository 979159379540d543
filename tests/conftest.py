import gc
import importlib.util
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from bounds import Checked
from compilers import floats_are_constants
from distributed.cluster import Cluster
from faster_interpreter import speed_up
from garbage import exit_at_once, rarely

# Without a GPU, Triton's kernels are interpreted: slowly, one program after another. Triton reads
# the variable when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Repeatable, so that only a change makes a test fail; no deadline, since the machine may be busy.
hypothesis.settings.register_profile(
    "vicinal", deadline=None, derandomize=True, database=None, print_blob=False
)
hypothesis.settings.load_profile("vicinal")

# Parallel workers, and the processes that they start, would compete for the processors; tests of
# threads set their number.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# Of the interpreter of Triton 3.6 and a NumPy that it was not written for.
OF_TRITON = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"

# Of torch 2.11 and 2.12, where sparse tensors are made with checks on or off alike.
OF_SPARSE_TENSORS = "ignore:Sparse invariant checks are implicitly disabled:UserWarning"

# Of torch.export.load in torch 2.10 to 2.12.
OF_EXPORT = "ignore:The given buffer is not writable:UserWarning"


# Of torch on a GPU: of its checks for waits, and of what its compiler imports.
ON_GPU = (
    "ignore:Synchronization debug mode is a prototype feature:UserWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:The CUDA Graph is empty:UserWarning",  # of a capture that is refused
    "ignore:TensorFloat32 tensor cores for float32:UserWarning",
)

# Of packages that `vicinal.interop` imports: torch_geometric, and those that spconv brings.
OF_CONTAINERS = (
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
    "ignore:'locale.getdefaultlocale' is deprecated:DeprecationWarning",
)

# Stand-ins for packages that are not installed; last, so that installed ones come first.
sys.path.append(str(Path(__file__).parent / "interop" / "stand_ins"))


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # what is imported and collected stays
    for warning in OF_CONTAINERS:
        config.addinivalue_line("filterwarnings", warning)
    if torch.cuda.is_available():
        for warning in ON_GPU:
            config.addinivalue_line("filterwarnings", warning)
    if torch.__version__.startswith(("2.10.", "2.11.", "2.12.")):
        config.addinivalue_line("filterwarnings", OF_EXPORT)
    if torch.__version__.startswith(("2.11.", "2.12.")):
        config.addinivalue_line("filterwarnings", OF_SPARSE_TENSORS)
    if os.environ.get("TRITON_INTERPRET") == "1":
        config.addinivalue_line("filterwarnings", OF_TRITON)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-kernels", action="store_true", help="compile the Triton kernels for every case"
    )
    parser.addoption("--shard", help="only the tests of one of N processes, such as 0/4")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps every N-th test, for processes side by side where pytest-xdist is not installed."""
    if config.getoption("--shard"):
        first, n = map(int, config.getoption("--shard").split("/"))
        config.hook.pytest_deselected(items=[x for i, x in enumerate(items) if i % n != first])
        items[:] = items[first::n]


def pytest_collection_finish() -> None:
    rarely()


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # pytest has its results, and waits for it to end
        exit_at_once()


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


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Ranks for tests of `vicinal.distributed`; they start when first asked for."""
    cluster = Cluster()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session", autouse=True)
def light_seeds() -> Iterator[None]:
    """Seeds without the description of the stack that torch keeps for devices to come."""
    with pytest.MonkeyPatch.context() as patches:
        if not torch.cuda.is_available():
            patches.setattr(torch, "manual_seed", torch.default_generator.manual_seed)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Compiles with numbers as constants, but for tests with the marker ``floats_are_inputs``."""
    with floats_are_constants():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    if item.get_closest_marker("floats_are_inputs"):
        with floats_are_constants(False):
            return (yield)
    return (yield)


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter() -> Iterator[None]:
    """Triton's interpreter with less work of its own."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patches:
        speed_up(patches)
        yield


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for kernels that Triton compiles, the same for all workers of this run of tests."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return folder / "kernels"


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
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """`examples.detect_digits` with few digits, and few canvases to test and to draw."""
    from test_digits_scenes import strokes

    from examples import detect_digits

    monkeypatch.setattr(detect_digits, "TEST_CANVASES", 2)
    monkeypatch.setattr(detect_digits, "N_DRAWN", 1)
    monkeypatch.setattr(detect_digits, "load_digits", lambda: strokes(200))


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
    """The checking interpreter; None on a GPU, for which there is `test_sanitizer`."""
    import triton.runtime.interpreter as interpreter

    from vicinal.backends.triton import ops, plan_ops
    from vicinal.backends.triton.launch import launch
    from vicinal.backends.triton.sampling import ops as sampling_ops

    if not ops.INTERPRETS:
        return None
    checked = Checked(interpreter._interpreter)

    def checked_launch(kernel: Any, n_programs: int, *arguments: Any, **options: Any) -> None:
        checked.allow(arguments)
        launch(kernel, n_programs, *arguments, **options)

    monkeypatch.setattr(interpreter, "_interpreter", checked)
    for module in (ops, plan_ops, sampling_ops):
        monkeypatch.setattr(module, "launch", checked_launch)
    return checked
