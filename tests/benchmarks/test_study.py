"""A study measures what it says it does, on the CPU and on a GPU, and reports what it could not."""

import importlib.util
import itertools
import json
import os
import platform
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import __main__ as study
from benchmarks import compare, machine, measure, outcome, report
from benchmarks import layer as layers
from benchmarks.baselines import BASELINES, comparison
from benchmarks.cases import SETTINGS, all_cases, block, ladders, tuning
from benchmarks.goals import GOALS, outcome_of
from benchmarks.layer import Layer
from benchmarks.measure import Call, Timings
from benchmarks.outcome import (
    DISAGREES,
    KILLED,
    OUT_OF_MEMORY,
    RETAINED,
    CaseSkipped,
    DisagreementError,
    Figures,
    Outcome,
)
from benchmarks.scenes import particle_tracks

CPU = torch.device("cpu")
FULL, QUICK = (SETTINGS["cpu"][size] for size in ("full", "quick"))
ON_GPU, DRY = SETTINGS["cuda"]["full"], SETTINGS["cuda"]["quick"]._replace(device="cpu")
interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton's kernels are not interpreted",
)


def tiny_layer(n_tracks: int = 1, size: int = 48) -> Layer:
    return Layer(particle_tracks(n_tracks, size=size), embed_dim=16, heads=2)


def once(calls: Mapping[str, Call], repeats: int, device: torch.device) -> Timings:
    """Calls each once, and pretends that each took a second."""
    for call in calls.values():
        call()
    return Timings(dict.fromkeys(calls, (1.0,)))


def pretend_times(monkeypatch: pytest.MonkeyPatch, time_calls: Any) -> None:
    monkeypatch.setattr(layers, "time_calls", time_calls)


# -------------------------------------------------------------------------------------- cases


@interpreted
@pytest.mark.filterwarnings("ignore")  # of NumPy, which interprets the kernels, and of compilers
@pytest.mark.parametrize("name", [*all_cases(DRY)])
def test_case_of_a_gpu_gives_figures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vicinal.backends import reference, triton

    if "edges" in name:
        pytest.importorskip("torch_geometric")
    pretend_times(monkeypatch, once)
    peak = measure.Peak(9, 8)
    for module in (block, comparison):
        monkeypatch.setattr(module, "peak_memory", lambda call, device: (call(), peak)[1])
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(triton, "find_runs", reference.find_runs)  # no interpreter sorts
    figures = all_cases(DRY)[name]()
    for figure, value in figures.items():
        if figure == "no_step":
            assert "CPU" in str(value)  # FlexAttention's
        elif figure == "package":
            assert Path(str(value)).name == "vicinal"
        else:
            assert float(value) >= 0, figure


@interpreted
@pytest.mark.filterwarnings("ignore")
def test_sweep_tries_all_settings_and_reports_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    from vicinal.backends import reference, triton
    from vicinal.backends.triton import launch as launching
    from vicinal.backends.triton import ops

    pretend_times(monkeypatch, once)
    monkeypatch.setattr(triton, "find_runs", reference.find_runs)
    launched, launch, chosen = [], launching.launch, launching._constants

    def record_launch(kernel: Any, n_programs: int, *arguments: Any, **options: Any) -> None:
        if kernel.__name__ == "attend":
            launched.append([options[name] for name in ("ROWS", "BLOCK", "num_warps")])
            if options["BLOCK"] == 32:
                raise RuntimeError("out of resources")
        launch(kernel, n_programs, *arguments, **options)

    with mock.patch.object(ops, "launch", record_launch):
        figures = tuning.sweep(DRY.layer(), 1, (16, 32), (2,), 32)
    assert [32, 16, 2] in launched
    assert figures["forward_seconds 16x2"] == 1
    assert figures["problem 32x2"] == "RuntimeError: out of resources"
    assert "forward_seconds 32x2" not in figures
    assert launching._constants is chosen


def test_cases_give_figures(restored_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tiny_layer()
    monkeypatch.setattr(block, "usable_cores", lambda: 2)
    timed = block.stages(layer, 1)
    assert {f"step_seconds {stage}" for stage in block.STAGES} < set(timed)
    package = block.seconds(layer, 1).pop("package")
    assert Path(str(package)).name == "vicinal"
    for figures in (block.compute(layer, 1), block.two_threads(layer, 1), timed):
        assert all(float(value) > 0 for value in figures.values())
    monkeypatch.setattr(block, "usable_cores", lambda: 1)
    with pytest.raises(CaseSkipped, match="two cores"):
        block.two_threads(layer, 1)


def test_growth_is_of_time_per_query(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = tiny_layer(), tiny_layer(3, 96)
    timings = Timings({"0": (1.0, 1.0, 9.0), "1": (4.0, 6.0, 18.0)})  # ratios of 4, 6 and 2
    pretend_times(monkeypatch, lambda calls, repeats, device: timings)
    figures = block.scaling([small, large], 3)
    assert figures["step_growth"] == pytest.approx(4 * len(small) / len(large))


def test_rate_of_attention_counts_its_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tiny_layer()
    pretend_times(monkeypatch, once)
    flops = 4 * layer.n_pairs * 16, 2 * len(layer) * 16 * 3 * 16
    rate = block.compute(layer, 1)["attention_rate_over_gemm"]
    assert rate == pytest.approx(flops[0] / flops[1])


# ------------------------------------------------------------------------------------ measure


def test_calls_alternate() -> None:
    calls: list[str] = []
    named = {name: partial(calls.append, name) for name in "ab"}
    timings = measure.time_calls(named, 2, CPU)
    assert calls == ["a", "b", "a", "b", "a", "b"]  # the first of each warms up
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 2, "b": 2}


def test_events_time_calls_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, clock, flushed = mock.MagicMock(), itertools.count(), torch.zeros(2)
    cuda.Event = lambda enable_timing: mock.MagicMock(
        record=lambda: next(clock), elapsed_time=lambda end: 5.0
    )
    monkeypatch.setattr(torch, "empty", lambda size, **options: flushed)
    monkeypatch.setattr(torch, "cuda", cuda)
    calls: list[str] = []
    named = {name: partial(calls.append, name) for name in "ab"}
    timings = measure.time_calls(named, 2, torch.device("cuda"))
    assert "".join(calls) == "aaa" + "bbb" + "abab"
    assert timings.seconds == {"a": (0.005, 0.005), "b": (0.005, 0.005)}
    assert next(clock) == 8  # an event before each timed call and one after it


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset on Linux alone")
def test_peak_memory_is_that_of_the_call() -> None:
    peak = measure.peak_memory(lambda: torch.ones(2**24), CPU)
    assert 0.95 < peak.of_call / 2**26 < 1.3


def test_peak_and_graph_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, call, device = mock.MagicMock(), mock.MagicMock(), torch.device("cuda")
    cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 3, 10
    monkeypatch.setattr(torch, "cuda", cuda)
    peak = measure.peak_memory(call, device)
    assert (peak.total, peak.of_call, call.call_count) == (10, 7, 2)
    replay = measure.as_cuda_graph(call, device)
    assert call.call_count == 2 + measure.WARM_UPS + 1
    replay()
    cuda.CUDAGraph().replay.assert_called_once()
    assert measure.as_cuda_graph(call, CPU) is call


# ------------------------------------------------------------------------------------ outcome


def run_python(code: str, timeout: float = 60) -> Outcome:
    return outcome.run_command([sys.executable, "-c", code], timeout=timeout)


def test_outcome_of_a_process() -> None:
    found = run_python('print("noise"); print(\'{"figures": {"a": 1.5}}\')')
    assert (found.figures, found.problem) == ({"a": 1.5}, None)
    assert run_python('print(\'{"problem": "no"}\')').problem == "no"
    failed = run_python("raise ValueError('wrong sizes')")
    assert failed.problem == "failed: ValueError: wrong sizes"
    assert run_python("import time; time.sleep(60)", timeout=0.2).problem == "took longer than 0 s"
    code = f"import sys; print('some baseline differs', file=sys.stderr); sys.exit({DISAGREES})"
    with pytest.raises(DisagreementError, match="some baseline differs"):
        run_python(code)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_processes_are_reported() -> None:
    killed = run_python(f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    assert killed.problem == KILLED
    assert killed.lacked_memory
    crashed = run_python(f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})")
    assert "SIGSEGV" in str(crashed.problem)
    assert not crashed.lacked_memory


def test_failed_allocations_are_reported_as_such() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**58, dtype=torch.uint8)
    of_gpu = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"
    codes = [f"raise RuntimeError({text!r})" for text in (str(failure.value), of_gpu)]
    for code in (*codes, "bytearray(2**60)"):
        found = run_python(code)
        assert found.problem == OUT_OF_MEMORY
        assert found.lacked_memory


def test_a_case_in_a_process_of_its_own() -> None:
    found = study.run_case("memory/tracks", "cpu", "quick")
    assert found.problem is None
    assert found.number("points") > 1000
    assert 3 < found.number("peak_over_query") < 60


def test_a_case_with_a_malloc_that_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = study.run_case(RETAINED + "compute/tracks", "cpu", "quick")
    if platform.libc_ver()[0] != "glibc":
        assert "GNU" in str(found.problem)
        return
    assert found.number("forward_over_floor") > 0
    started: list[Mapping[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda path, arguments, env: started.append(env))
    outcome.retain_freed_memory()
    assert outcome.RETAINING.items() <= started[0].items()
    for name, value in outcome.RETAINING.items():
        monkeypatch.setenv(name, value)
    outcome.retain_freed_memory()
    assert len(started) == 1  # not again


@interpreted
def test_a_dry_run_in_a_process_of_its_own() -> None:
    found = study.run_case("agreement/pairs", "cuda", "quick", dry_run=True)
    assert found.problem is None
    assert found.number("roundings_apart") < comparison.ROUNDINGS


# -------------------------------------------------------------------------------------- study

SECONDS = [f"{kind}_seconds" for kind in ("forward", "step")]
FIGURES: Figures = dict.fromkeys(
    [
        *(goal.figure for goals in GOALS.values() for goal in goals),
        *("points", "neighbors", "peak_bytes", "roundings_apart"),
        *SECONDS,
        *(f"{name}_{i}" for name in ("points", *SECONDS) for i in range(2)),
        *(f"{kind} {part}" for kind in SECONDS for part in (*block.STAGES, block.FLOOR)),
    ],
    2.0,
)
"""Enough for every table and plot."""


def pretend(answers: Mapping[str, Outcome], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gives the study ``answers`` by the beginning of names, else figures; lists what ran."""
    ran = []

    def run_case(name: str, *options: object, timeout: float) -> Outcome:
        ran.append(name)
        found = (answer for start, answer in answers.items() if name.startswith(start))
        return next(found, Outcome(figures=FIGURES))

    monkeypatch.setattr(study, "run_case", run_case)
    return ran


def run_study(*arguments: object) -> int:
    with mock.patch.object(sys, "argv", ["benchmarks", *map(str, arguments)]):
        return study.main()


@pytest.mark.parametrize("settings", [FULL, ON_GPU], ids=["cpu", "cuda"])
def test_study_has_every_case_once_and_checks_first(settings: Any) -> None:
    names = [name for ladder in ladders(settings) for name in ladder]
    assert len(names) == len(set(names))
    goals = GOALS[settings.device]
    assert all(any(name.startswith(goal.case) for name in names) for goal in goals)
    if settings is ON_GPU:
        assert all(name.startswith("agreement/") for name in names[:5])
        assert len(particle_tracks(ON_GPU.tracks[0], size=2048).coordinates) == 202_890
    else:
        assert {name.split("/")[1] for name in names if "baselines/" in name} >= set(BASELINES)
        others = itertools.dropwhile(lambda name: "baselines/" in name, names)
        assert not any(name.startswith("baselines/") for name in others)


def test_a_study_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A part ends after its seconds, in mid-case too; the next goes on with what is left."""
    clock, given = [0.0], []
    late = Outcome(problem=f"{outcome.TOOK_LONGER} 30 s")

    def run_case(name: str, *options: object, timeout: float) -> Outcome:
        given.append((name, timeout))
        clock[0] += min(70, timeout)
        return Outcome(figures=FIGURES) if timeout > 70 else late

    monkeypatch.setattr(study, "run_case", run_case)
    monkeypatch.setattr(study, "time", mock.Mock(monotonic=lambda: clock[0]))
    part = ("--out", tmp_path, "--only", "memory/", "--seconds", 100, "--resume")
    names = [f"memory/{name}" for name in ("tracks", "volume", "handwriting")]
    for _ in range(4):
        assert run_study(*part) == 0
    assert given == [
        (names[0], 100), (names[1], 30), (names[1], 100), (names[2], 30), (names[2], 100),
    ]  # fmt: skip
    (file,) = tmp_path.glob("*.json")
    assert [*report.load(file)] == names
    monkeypatch.setattr(machine, "describe_commit", lambda: {"id": "x", "dirty": False})
    file.rename(tmp_path / (machine.file_stem({"id": "x", "dirty": False}) + ".json"))
    assert run_study(*part) == 0  # figures of other code do not count
    assert given[-2:] == [(names[0], 100), (names[1], 30)]


def test_a_case_that_needs_more_than_a_part(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []

    def run_case(name: str, *options: object, timeout: float) -> Outcome:
        ran.append(name)
        return Outcome(problem=f"{outcome.TOOK_LONGER} {timeout:.0f} s")

    monkeypatch.setattr(study, "run_case", run_case)
    part = ("--out", tmp_path, "--only", "threads", "--seconds", 100, "--resume")
    assert run_study(*part) == run_study(*part) == 0
    assert ran == ["threads"]


def test_study_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_study("--device", "cuda", "--out", tmp_path) == 2
    assert not list(tmp_path.iterdir())


def test_smaller_scenes_where_memory_is_lacking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {
        "baselines/pairs/100": Outcome(problem=OUT_OF_MEMORY),
        "baselines/edges/": Outcome(problem="not installed"),
    }
    ran = pretend(answers, monkeypatch)
    names = ("baselines/pairs/", "baselines/edges/")
    assert run_study("--out", tmp_path, "--only", *names) == 0
    kinds = ("pairs/10", "edges/10", "pairs/100", "pairs/75", "edges/100")
    assert ran == [f"baselines/{kind}" for kind in kinds]
    told = capsys.readouterr().out
    assert OUT_OF_MEMORY in told
    assert "not installed" in told


def test_study_stops_where_a_baseline_disagrees(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run_case(name: str, *options: object, **named: object) -> Outcome:
        raise DisagreementError("some baseline differs")

    monkeypatch.setattr(study, "run_case", run_case)
    assert run_study("--out", tmp_path) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "plots"),
    [([], ["scaling", "baselines", "floor"]), (["--dry-run"], ["baselines", "floor"])],
    ids=["cpu", "cuda"],
)
def test_study_saves_and_draws(
    options: list[str], plots: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    ran = pretend({"stages/tracks": Outcome(problem="no time")}, monkeypatch)
    stages_of = ["stages/volume"] if not options else []
    plots = plots if not options else plots[:1]
    assert run_study(*options, "--out", tmp_path) == 0
    assert "million" in ran or not options
    drawn = {path.stem.rsplit("-", 1)[1] for path in tmp_path.glob("*.png")}
    assert drawn == set(plots)
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))
    assert stages_of == [name for name in ran if name == "stages/volume"]

    (path,) = tmp_path.glob("*.json")
    read = json.loads(path.read_text())
    assert read["machine"]["cores"] >= 1
    assert read["machine"]["instruction_set"] == torch.backends.cpu.get_cpu_capability()
    assert torch.__version__.split("+")[0] == read["versions"]["torch"].split("+")[0]
    assert {"python", "vicinal", "transformers", "triton"} < set(read["versions"])
    assert set(read["commit"]) == {"id", "dirty", "sources"}
    assert {"started", "size", "settings", "gpu"} < set(read)
    assert read["cases"]["stages/tracks"]["problem"] == "no time"
    assert {goal["value"] for goal in read["goals"]} == {2.0}
    loaded = report.load(path)
    assert [*loaded] == ran
    assert loaded["stages/tracks"].problem == "no time"
    assert loaded["compute/tracks"].figures == FIGURES


def test_figures_of_earlier_commits_are_read(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (path,) = report.RESULTS.glob("*-10a092ed48.json")
    outcomes = report.load(path)
    assert outcomes["baselines/gathering/10"].number("peak_bytes") > 2**33
    assert outcomes[RETAINED + "scaling/time"].number("step_growth") == pytest.approx(1.09, 0.01)
    assert run_study("--show", path, "--out", tmp_path) == 0
    drawn = {plot.stem.rsplit("-", 1)[1] for plot in tmp_path.iterdir()}
    assert drawn == {"scaling", "baselines", "floor"}


def test_goals_are_judged() -> None:
    forward = next(goal for goal in GOALS["cpu"] if goal.figure == "attention_rate_over_gemm")
    assert forward.reaches(0.6, forward.bar)
    assert not forward.reaches(0.6, forward.aim)
    assert not GOALS["cpu"][0].reaches(2.0, GOALS["cpu"][0].bar)
    # The largest scene counts.
    goal = next(goal for goal in GOALS["cpu"] if goal.case == "baselines/pairs/")
    outcomes = {
        f"baselines/pairs/{n}": Outcome(figures={"points": float(n), goal.figure: n / 2})
        for n in (10, 75, 50)
    } | {"baselines/pairs/100": Outcome(problem=OUT_OF_MEMORY)}
    assert outcome_of(goal, outcomes).number("points") == 75


def test_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    found = mock.MagicMock(major=9, minor=0, total_memory=2**37, multi_processor_count=132)
    found.name = "NVIDIA H200"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: found)
    told = machine.describe_gpu()
    assert (told["name"], told["capability"], told["memory_gib"]) == ("NVIDIA H200", "9.0", 128)
    commit: dict[str, str | bool] = {"id": "abc", "dirty": True}
    assert machine.file_stem(commit, "NVIDIA H200") == "nvidia-h200-abc-dirty"


def test_comparison_of_commits() -> None:
    before: list[Figures] = [{"plan": 1.0}, {"plan": 2.0}, {"plan": 4.0}]
    after: list[Figures] = [{"plan": 0.5}, {"plan": 1.2}, {"plan": 8.0}]
    ratios = compare.ratios(before, after)
    assert "0.600" in ratios
    assert "0.500 to 2.000" in ratios
    assert compare.slower(before, after) == []
    after = [{"plan": 2 * float(run["plan"])} for run in before]
    (warning,) = compare.slower(before, after)
    assert "plan" in warning
    assert "2.00" in warning


def test_commits_without_window_shapes_can_be_compared() -> None:
    code = "import vicinal; del vicinal.Window; import benchmarks.cases; print({})"
    finished = run_python(code)
    assert finished.problem is None, finished.problem
