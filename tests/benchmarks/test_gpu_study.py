"""Every case of the study on a GPU runs, here on the CPU, and the study tells what it found."""

import importlib.util
import itertools
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import machine, runner
from benchmarks.cases.stages import FLOOR, STAGES
from benchmarks.gpu import __main__ as study
from benchmarks.gpu import case, cases, meter, tiling
from benchmarks.gpu.cases import (
    GPU_PEERS,
    all_cases,
    attention,
    block,
    contests,
    study_names,
    tuning,
)
from benchmarks.gpu.goals import GOALS
from benchmarks.gpu.report import report, sweeps
from benchmarks.gpu.sizes import SIZES, make_layer
from benchmarks.measure import Call, Turns
from benchmarks.outcome import OUT_OF_MEMORY, DisagreementError, Figures, Outcome
from benchmarks.scenes import particle_tracks
from vicinal import neighborhood_attention
from vicinal.backends import reference, triton

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from vicinal.backends.triton import attention as attention_kernels
from vicinal.backends.triton import launch as launching
from vicinal.backends.triton import ops as triton_ops

# What numpy, which interprets the kernels, says of what they mask out; and what compilers say.
pytestmark = pytest.mark.filterwarnings("ignore")
interpreted = pytest.mark.skipif(not triton_ops.INTERPRETS, reason="kernels are not interpreted")

CPU = torch.device("cpu")
QUICK = SIZES["quick"]
DRY = all_cases(QUICK, CPU)

FIGURES: Figures = dict.fromkeys(
    [
        *(goal.figure for goal in GOALS),
        *("points", "neighbors", "forward_seconds", "step_seconds"),
        *("roundings_apart", "rows_chosen"),
        *(f"{kind}_seconds {rows}" for kind in ("forward", "step") for rows in tuning.ROWS),
        *(f"{kind}_seconds 16x1" for kind in ("forward", "backward")),
        *(f"{kind}_seconds {part}" for kind in ("forward", "step") for part in (*STAGES, FLOOR)),
    ],
    1.0,
)
"""Enough for every table and plot."""


def once(*calls: Call, repeats: int) -> Turns:
    """Calls each once, and pretends that each took a second."""
    for call in calls:
        call()
    return Turns(((1.0,),) * len(calls))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is repeated or compiled, and no interpreter sorts."""
    for part in (cases, attention, block, contests, tuning):
        monkeypatch.setattr(part, "clock_of", lambda device: once)
    for part in (block, contests):
        monkeypatch.setattr(part, "peak", lambda device, call: (call(), meter.Peak(1, 9))[1])
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(triton, "find_runs", reference.find_runs)


# -------------------------------------------------------------------------------------- cases


@interpreted
@pytest.mark.parametrize("name", [*DRY])
def test_case_gives_figures(name: str, hasty: None) -> None:
    figures = DRY[name]()
    assert figures["points"] in (12, 14)
    for figure, value in figures.items():
        if figure == "no_step":
            assert "CPU" in str(value)  # FlexAttention's
        else:
            assert float(value) >= 0, figure


@interpreted
def test_sweep_tries_all_settings_and_says_which_fail(hasty: None) -> None:
    launched = []
    launch = launching.launch

    def record_launch(kernel: Any, n_programs: int, *arguments: Any, **options: Any) -> None:
        if kernel is attention_kernels.attend:
            launched.append([options[name] for name in ("ROWS", "BLOCK", "num_warps")])
            if options["BLOCK"] == 32:
                raise RuntimeError("out of resources")
        launch(kernel, n_programs, *arguments, **options)

    layer = make_layer(QUICK.scene, QUICK, CPU)
    chosen = launching._constants
    with mock.patch.object(triton_ops, "launch", record_launch):
        figures = tuning.sweep(layer, 32, (16, 32), (2,), 1)
    assert [32, 16, 2] in launched
    assert figures["forward_seconds 16x2"] == 1
    assert figures["problem 32x2"] == "RuntimeError: out of resources"
    assert "forward_seconds 32x2" not in figures
    assert launching._constants is chosen
    sweep = Outcome(figures=figures)
    lines = sweeps({"sweep/32": sweep, "sweep/64": Outcome(problem=OUT_OF_MEMORY)}).splitlines()
    assert lines[1].split() == ["32", "16", "2", "1000.000", "1000.000"]
    assert lines[2].endswith("out of resources")
    assert lines[3].endswith(OUT_OF_MEMORY)


@interpreted
@pytest.mark.parametrize("rows", [1, 32])
def test_tiles_have_the_rows_that_are_asked_for(rows: int, hasty: None) -> None:
    layer = make_layer(QUICK.scene, QUICK, CPU)
    chosen = tiling.chosen_rows(len(layer), len(layer))
    with tiling.choosing(lambda n_rows, n_others: rows):
        assert len(tiling.query_tiles(layer.plan).firsts) == -(-len(layer) // rows)
    assert len(tiling.point_tiles(layer.plan).firsts) == -(-len(layer) // chosen)
    # Whatever the tiles, the same is computed.
    q, k, v = layer.operands()
    expected = neighborhood_attention(q, k, v, layer.make_plan(), backend="reference")
    torch.testing.assert_close(layer.attend(q, k, v), expected)


# -------------------------------------------------------------------------------------- meter


def test_events_time_calls_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = mock.MagicMock()
    clock = itertools.count()
    cuda.Event = lambda enable_timing: mock.MagicMock(
        record=lambda: next(clock), elapsed_time=lambda end: 5.0
    )
    flushed = torch.zeros(2)
    monkeypatch.setattr(torch, "empty", lambda size, **options: flushed)
    monkeypatch.setattr(torch, "cuda", cuda)
    calls: list[str] = []
    turns = meter.take_turns(lambda: calls.append("a"), lambda: calls.append("b"), repeats=2)
    assert "".join(calls) == "aaa" + "bbb" + "abab"
    assert turns.seconds == ((0.005, 0.005), (0.005, 0.005))
    assert next(clock) == 8  # an event before each timed call and one after it


def test_peak_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = mock.MagicMock()
    cuda.memory_allocated.return_value = 3
    cuda.max_memory_allocated.return_value = 10
    monkeypatch.setattr(torch, "cuda", cuda)
    call = mock.MagicMock()
    peak = meter.peak(torch.device("cuda"), call)
    assert (peak.total, peak.of_call) == (10, 7)
    assert call.call_count == 2


def test_graphs_are_captured_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, call = mock.MagicMock(), mock.MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    replay = meter.replayed(torch.device("cuda"), call)
    assert call.call_count == meter.WARM_UPS + 1
    replay()
    cuda.CUDAGraph().replay.assert_called_once()
    assert meter.replayed(CPU, call) is call


@pytest.mark.parametrize("said", ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate"])
def test_a_gpu_without_memory_is_reported_as_such(said: str) -> None:
    outcome = runner.run_command([sys.executable, "-c", f"raise RuntimeError({said!r})"])
    assert outcome.problem == OUT_OF_MEMORY
    assert outcome.lacked_memory


# -------------------------------------------------------------------------------------- study


def pretend(answers: Mapping[str, Outcome], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the study get ``answers`` by the beginning of names, else figures; says what ran."""
    ran = []

    def run_case(name: str, dry_run: bool) -> Outcome:
        ran.append(name)
        for start, outcome in answers.items():
            if name.startswith(start):
                return outcome
        return Outcome(figures=FIGURES)

    monkeypatch.setattr(study, "run_case", run_case)
    return ran


def run_study(*arguments: object) -> int:
    with mock.patch.object(sys, "argv", ["gpu", *map(str, arguments)]):
        return study.main()


def test_study_needs_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_study("--out", tmp_path) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert "needs a GPU" in said.err
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_study_runs_everything_once_and_checks_first() -> None:
    ladders = study_names(SIZES["full"], CPU)
    names = [name for ladder in ladders for name in ladder]
    assert sorted(names) == sorted(all_cases(SIZES["full"], CPU))
    assert len(names) == len(set(names))
    assert [name for (name,) in ladders[: len(GPU_PEERS)]] == [
        f"agreement/{peer}" for peer in GPU_PEERS
    ]
    for goal in GOALS:
        assert any(name.startswith(goal.case) for name in names), goal


def test_the_scene_of_the_measures() -> None:
    tracks, size = SIZES["full"].scene
    assert len(particle_tracks(tracks, size=size).coordinates) == 202_890


def test_smaller_scenes_where_a_peer_lacks_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = pretend({"peers/pairs/420": Outcome(problem=OUT_OF_MEMORY)}, monkeypatch)
    outcomes: dict[str, Outcome] = {}
    for more in study.run(False, ("peers/pairs/", "million"), {"million": Outcome()}):
        outcomes |= more
    assert ran == ["peers/pairs/420", "peers/pairs/280"]
    assert OUT_OF_MEMORY in report(outcomes)


def test_study_stops_where_a_peer_disagrees(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run_case(name: str, dry_run: bool) -> Outcome:
        raise DisagreementError("some peer differs")

    monkeypatch.setattr(study, "run_case", run_case)
    assert run_study("--dry-run", "--out", tmp_path) == 1
    assert "some peer differs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_study_tells_saves_draws_and_resumes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    ran = pretend({"plan": Outcome(problem="no time")}, monkeypatch)
    arguments = ("--dry-run", "--out", tmp_path)
    assert run_study(*arguments) == 0
    assert len(ran) == len(DRY)
    said = capsys.readouterr().out
    assert all(goal.label in said for goal in GOALS)
    assert "no time" in said
    suffixes = sorted(path.name.rsplit("-", 1)[1] for path in tmp_path.iterdir())
    assert suffixes == ["floor.png", "peers.png", "quick.json", "sweep.png"]

    ran.clear()
    assert run_study(*arguments, "--resume", "--only", "plan", "attention", "peers") == 0
    assert ran == ["plan/tracks"]  # all else has figures
    (path,) = tmp_path.glob("*.json")
    read = json.loads(path.read_text())
    assert {"machine", "versions", "commit", "started", "gpu", "settings"} < set(read)
    assert {"python", "torch", "triton"} < set(read["versions"])
    assert read["settings"]["dtype"] == "float32"
    assert read["cases"]["plan/tracks"]["problem"] == "no time"
    assert read["cases"]["million"]["figures"]["peak_gib"] == 1
    values = {goal["label"]: goal["value"] for goal in read["goals"]}
    assert values["attention forward / copying q, k, v and out"] == 1


def test_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    found = mock.MagicMock(major=9, minor=0, total_memory=2**37, multi_processor_count=132)
    found.name = "NVIDIA H200"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: found)
    told = machine.describe_gpu()
    assert (told["name"], told["capability"], told["memory_gib"]) == ("NVIDIA H200", "9.0", 128)
    commit: machine.Commit = {"id": "abc", "dirty": True}
    assert machine.file_stem(commit, "NVIDIA H200") == "nvidia-h200-abc-dirty"


@interpreted
def test_a_case_in_a_process_of_its_own() -> None:
    outcome = case.run_case("agreement/pairs", dry_run=True)
    assert outcome.problem is None
    assert outcome.number("roundings_apart") < 256
