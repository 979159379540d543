"""`examples.detect_digits` from its command line to its checkpoint."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from test_digits_scenes import strokes

from examples import detect_digits
from examples.digits.checkpoints import STATE, WEIGHTS
from examples.digits.processes import PeerError
from examples.digits.training import ConfigError, DivergenceError, InterruptionError


def call(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    monkeypatch.setattr(sys, "argv", ["detect_digits", *map(str, options)])
    return detect_digits.main()


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: object
) -> str:
    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, *options)
    assert exit_.value.code != 0
    return capsys.readouterr().err


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect_digits, "TEST_CANVASES", 2)
    monkeypatch.setattr(detect_digits, "DRAWN", 1)
    monkeypatch.setattr(detect_digits, "load_digits", lambda: strokes(200))


@pytest.mark.usefixtures("small")
def test_trains_tests_draws_and_loads_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ("--steps", 2, "--batch", 2, "--out", tmp_path)
    assert call(monkeypatch, *options) == 0
    printed, progress = capsys.readouterr()
    for part in (
        r"with neighborhood attention, on 1 x cpu",
        r"A step takes \d+ ms: .*data \d+ ms \(\d+%\)",
        r"AP50 [01]\.\d{3}, AP75 [01]\.\d{3}",
        r"Training and evaluation: \d+ s, peak memory \d\.\d\d GiB",
        rf"Loaded again from {re.escape(str(tmp_path / WEIGHTS))}, it finds nothing on a canvas",
    ):
        assert re.search(part, printed), part
    assert re.search(r"2/2 .* loss \d+\.\d+, [\d,]+ points/s", progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        (detect_digits.PICTURE, detect_digits.PAGE, detect_digits.FIGURES, WEIGHTS, STATE)
    )
    figures = json.loads((tmp_path / detect_digits.FIGURES).read_text())
    assert (figures["attention"], figures["steps"], figures["batch"]) == ("neighborhood", 2, 2)
    assert 0 <= figures["ap50"] <= 1

    assert "was begun with neighborhood" in refused(
        monkeypatch, capsys, *options, "--resume", "--attention", "deformable"
    )
    assert call(monkeypatch, *options, "--resume", "--seed", 1) == 1
    assert "was begun with: seed 0" in capsys.readouterr().out


def test_refuses_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for options, message in (
        (("--steps", 0), "argument --steps: expected an integer of at least 1, got 0"),
        (("--seed", "-1"), "expected an integer from 0"),
        (("--attention", "dense"), "argument --attention: invalid choice"),
        (("--out", tmp_path / "file"), "argument --out: "),
        (("--out", tmp_path, "--resume"), f"argument --resume: there is no {tmp_path / STATE}"),
    ):
        assert message in refused(monkeypatch, capsys, *options)


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (InterruptionError("interrupted after step 3 of 9"), 130, "after step 3 of 9. To go on: "),
        (KeyboardInterrupt(), 130, "from its last checkpoint: "),
        (DivergenceError("step 3 of 9: the loss is not finite"), 1, "Stopped at step 3 of 9: the"),
        (ConfigError("batch: expected at least 2"), 1, "Stopped: batch: expected at least 2"),
        (PeerError("another process stopped"), 1, "Stopped: another process stopped."),
    ],
)
def test_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: BaseException,
    status: int,
    expected: str,
) -> None:
    def fail(*_: Any) -> None:
        (tmp_path / STATE).touch()
        raise error

    monkeypatch.setattr(detect_digits, "run", fail)
    assert call(monkeypatch, "--steps", 9, "--out", tmp_path) == status
    printed = capsys.readouterr().out
    assert expected in printed
    command = f" -m examples.detect_digits --steps 9 --out {tmp_path} --resume"
    assert (command in printed) == (status == 130)


@pytest.mark.parametrize("older", [False, True])
def test_promises_no_checkpoint_that_is_not_the_run_s(
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
    assert call(monkeypatch, "--out", tmp_path) == 130
    assert capsys.readouterr().out == "\nStopped. There is no checkpoint yet.\n"


def test_the_command_to_go_on_calls_the_interpreter_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["detect_digits", "--out", "a folder", "--resume"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    end = "-m examples.detect_digits --out 'a folder' --resume"
    assert detect_digits._command() == f".venv/bin/python {end}"
    monkeypatch.setattr(detect_digits, "rank_and_number", lambda: (0, 2))
    monkeypatch.setattr(sys, "executable", "/opt/my python")
    assert detect_digits._command() == (
        f"'/opt/my python' -m torch.distributed.run --nproc-per-node 2 {end}"
    )


def test_one_process_alone_tells_what_it_alone_knows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise problem

    monkeypatch.setattr(detect_digits, "run", fail)
    monkeypatch.setattr(detect_digits, "rank_and_number", lambda: (1, 2))
    for alone, expected in ((True, "\nStopped at step 3.\n"), (False, "")):
        problem = DivergenceError("step 3", alone)
        assert call(monkeypatch, "--out", tmp_path) == 1
        assert capsys.readouterr().out == expected
