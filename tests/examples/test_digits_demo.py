"""`examples.detect_digits` from its command line to its checkpoint."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import call, refused
from safetensors.torch import load_file
from started import run_light

from examples import detect_digits
from examples.digits.model import DigitDetector
from examples.training import command
from examples.training.checkpoints import STATE, WEIGHTS, load_state, load_weights, read_metadata
from examples.training.command import FIGURES
from examples.training.loop import ConfigError, DivergenceError, InterruptionError
from examples.training.processes import PeerError, start_processes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("small_demo")
def test_trains_tests_draws_and_saves_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--steps", 2, "--batch", 2, "--out", tmp_path)
    assert call(monkeypatch, detect_digits, *options) == 0
    assert sorted(contents(tmp_path)) == sorted(
        (detect_digits.PICTURE, detect_digits.PAGE, FIGURES, WEIGHTS, STATE)
    )
    figures = json.loads((tmp_path / FIGURES).read_text())
    assert (figures["attention"], figures["steps"], figures["batch"]) == ("neighborhood", 2, 2)
    assert all(0 <= figures[name] <= 1 for name in ("ap", "ap50", "ap75"))
    parts = figures["seconds_of_a_step"]
    assert parts.keys() == {"data", "forward", "backward", "optimizer", "saving"}
    assert all(seconds > 0 for seconds in parts.values())
    assert figures["seconds"] > 2 * sum(parts.values())
    assert 2**27 < figures["peak_memory"] < 2**34
    printed, progress = capsys.readouterr()
    for name in ("ap", "ap50", "ap75"):
        assert f"{figures[name]:.3f}" in printed
    assert "2/2" in progress

    assert read_metadata(tmp_path) == {"attention": "neighborhood"}
    load_weights(tmp_path, DigitDetector("neighborhood"))
    state = load_state(tmp_path, torch.device("cpu"))
    assert len(state["losses"]) == 2
    for name, weight in load_file(tmp_path / WEIGHTS).items():
        assert torch.equal(weight, state["model"][name])
    assert (tmp_path / detect_digits.PICTURE).read_bytes().startswith(b"\x89PNG")

    before = contents(tmp_path)
    resume = (*options, "--resume", "--attention", "deformable")
    assert "argument --attention: " in refused(monkeypatch, capsys, detect_digits, *resume)
    assert call(monkeypatch, detect_digits, *options, "--resume", "--seed", 1) == 1
    assert contents(tmp_path) == before


def test_invalid_arguments_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for argument, options in (
        ("--steps", ("--steps", 0)),
        ("--seed", ("--seed", "-1")),
        ("--seed", ("--seed", 2**63)),
        ("--attention", ("--attention", "dense")),
        ("--out", ("--out", tmp_path / "file")),
        ("--out", ("--out", "")),
        ("--resume", ("--out", tmp_path / "typo", "--resume")),
    ):
        assert f"argument {argument}: " in refused(monkeypatch, capsys, detect_digits, *options)
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InterruptionError("interrupted after step 3 of 9"), 130),
        (KeyboardInterrupt(), 130),
        (DivergenceError("step 3 of 9: the loss is not finite", step=2), 1),
        (ConfigError("batch: expected at least 2"), 1),
        (PeerError("another process stopped"), 1),
    ],
)
def test_errors_give_an_exit_status_and_the_command_to_resume_if_that_helps(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: BaseException,
    status: int,
) -> None:
    def fail(*_: Any) -> None:
        (tmp_path / STATE).touch()
        raise error

    monkeypatch.setattr(detect_digits, "run", fail)
    assert call(monkeypatch, detect_digits, "--steps", 9, "--out", tmp_path) == status
    printed = capsys.readouterr().out
    assert str(error) in printed
    command = f" -m examples.detect_digits --steps 9 --out {tmp_path} --resume"
    assert printed.endswith(f"{command}\n") == (status == 130)


@pytest.mark.usefixtures("small_demo")
def test_the_demo_runs_where_the_system_does_not_tell_the_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "peak_memory", lambda device: None)
    assert call(monkeypatch, detect_digits, "--steps", 1, "--batch", 2, "--out", tmp_path) == 0
    assert json.loads((tmp_path / FIGURES).read_text())["peak_memory"] is None
    assert "memory" not in capsys.readouterr().out


@pytest.mark.parametrize("older", [False, True])
def test_no_command_to_resume_without_a_checkpoint_of_this_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    older: bool,
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    if older:
        (tmp_path / STATE).touch()
    monkeypatch.setattr(detect_digits, "run", fail)
    assert call(monkeypatch, detect_digits, "--out", tmp_path) == 130
    assert "--resume" not in capsys.readouterr().out


def test_the_command_to_resume_calls_the_running_interpreter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["detect_digits", "--out", "a folder", "--resume"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    end = "-m examples.detect_digits --out 'a folder' --resume"
    assert command.resume_command(detect_digits.MODULE) == f".venv/bin/python {end}"
    monkeypatch.setattr(command, "rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr(sys, "executable", "/opt/my python")
    assert command.resume_command(detect_digits.MODULE) == (
        f"'/opt/my python' -m torch.distributed.run --nproc-per-node 2 {end}"
    )


@pytest.mark.parametrize("on_one_process", [True, False])
def test_other_processes_print_only_errors_that_the_first_does_not_know(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    on_one_process: bool,
) -> None:
    def fail(*_: Any) -> None:
        raise DivergenceError("diverged", step=3, on_one_process=on_one_process)

    monkeypatch.setattr(detect_digits, "run", fail)
    monkeypatch.setattr(command, "rank_and_world_size", lambda: (1, 2))
    assert call(monkeypatch, detect_digits, "--out", tmp_path) == 1
    printed = capsys.readouterr().out
    assert ("diverged" in printed) == bool(printed) == on_one_process


def test_processes_that_share_canvases_are_started_outside_torchrun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Any] = []

    def start(n_processes: int, module: str, options: list[str]) -> int:
        started.append((n_processes, module, options))
        return 7

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(detect_digits, "start_processes", start)
    options = ["--space", "2", "--out", str(tmp_path)]
    assert call(monkeypatch, detect_digits, *options) == 7
    assert started == [(2, "examples.detect_digits", options)]


def test_a_number_of_processes_that_cannot_share_canvases_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert call(monkeypatch, detect_digits, "--space", 2, "--out", tmp_path) == 1
    assert "--space: expected a divisor of 1 " in capsys.readouterr().out


def _start_two(folder: Path, last: str, log: Path) -> None:
    paths = (folder, Path(detect_digits.__file__).parents[1], *sys.path)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(start_processes(2, "ranks_of_test", [str(folder), last]))


@pytest.mark.parametrize(("last", "status"), [("0", 0), ("3", 3)])
def test_started_processes_get_the_options_and_give_the_status(
    tmp_path: Path, last: str, status: int
) -> None:
    (tmp_path / "ranks_of_test.py").write_text(
        "import os, pathlib, sys, time\n"
        "rank = os.environ['RANK']\n"
        "pathlib.Path(sys.argv[1], rank).write_text(os.environ['WORLD_SIZE'])\n"
        # The first process to fail ends the other.
        "while not pathlib.Path(sys.argv[1], '0').exists(): time.sleep(0.05)\n"
        "sys.exit(int(sys.argv[2]) if rank == '1' else 0)\n"
    )
    log = tmp_path / "log"
    assert run_light(_start_two, tmp_path, last, log) == status, log.read_text()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]
