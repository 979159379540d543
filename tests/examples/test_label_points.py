"""`examples.label_points` from its command line to its checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from command_lines import call, refused
from safetensors.torch import load_file
from test_digits_scenes import strokes
from test_labels import small

from examples import label_points
from examples.labels import tasks
from examples.labels.model import PointLabeler
from examples.labels.tasks import TASKS
from examples.training.checkpoints import STATE, WEIGHTS, load_state, load_weights, read_metadata
from examples.training.command import FIGURES


@pytest.fixture(autouse=True)
def _small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "load_digits", lambda: strokes(200))
    for name in TASKS:
        monkeypatch.setitem(TASKS, name, small(name)._replace(n_tests=3, n_drawn=2))


@pytest.mark.parametrize(("data", "attention"), [("digits", "neighborhood"), ("hits", "stem")])
def test_trains_tests_draws_and_saves_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    data: str,
    attention: str,
) -> None:
    of_data = {"hits": 500} if data == "hits" else {}
    options: tuple[object, ...] = ("--data", data, "--attention", attention, "--out", tmp_path)
    options += ("--hits", 500) if of_data else ()
    assert call(monkeypatch, label_points, *options, "--steps", 2, "--batch", 2) == 0
    names = {label_points.PICTURE, FIGURES, WEIGHTS, STATE}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / label_points.PICTURE).read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / FIGURES).read_text())
    assert (figures["data"], figures["attention"], figures["steps"]) == (data, attention, 2)
    assert figures.get("hits") == of_data.get("hits")
    assert 0 <= figures["miou"] <= 1
    assert 0 <= figures["accuracy"] <= 1
    assert len(figures["ious"]) == len(TASKS[data].classes)
    printed, progress = capsys.readouterr()
    assert f"mIoU {figures['miou']:.3f}" in printed
    assert "2/2" in progress

    metadata = read_metadata(tmp_path)
    assert metadata == {"data": data, "attention": attention} | {
        name: str(value) for name, value in of_data.items()
    }
    model = PointLabeler(TASKS[data], attention)
    load_weights(tmp_path, model)
    state = load_state(tmp_path, torch.device("cpu"))
    assert len(state["losses"]) == 2
    for name, weight in load_file(tmp_path / WEIGHTS).items():
        assert torch.equal(weight, state["model"][name])

    again = ("--steps", 2, "--batch", 2, "--resume")
    assert call(monkeypatch, label_points, *options, *again) == 0
    assert json.loads((tmp_path / FIGURES).read_text())["miou"] == figures["miou"]
    message = refused(monkeypatch, capsys, label_points, *options, *again, "--attention", "pooling")
    assert "argument --attention: " in message
    if of_data:
        message = refused(monkeypatch, capsys, label_points, *options, *again, "--hits", 600)
        assert "argument --hits: expected 500" in message
    assert call(monkeypatch, label_points, *options, *again, "--seed", 3) == 1
    expected = f"Stopped: --seed: expected 0, as the run in {tmp_path}, got 3."
    assert expected in capsys.readouterr().out


def test_invalid_arguments_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for argument, options in (
        ("--data", ("--data", "clouds")),
        ("--hits", ("--data", "hits", "--hits", 0)),
        ("--out", ("--out", "")),
        ("--attention", ("--attention", "dense")),
        ("--resume", ("--out", tmp_path, "--resume")),
    ):
        message = refused(monkeypatch, capsys, label_points, *options)
        assert f"argument {argument}: " in message
        assert message.startswith("usage: python -m examples.label_points")
    assert "unrecognized" in refused(monkeypatch, capsys, label_points, "--hits", 9)
    typo = tmp_path / "typo"
    refused(monkeypatch, capsys, label_points, "--out", typo, "--resume")
    assert not typo.exists()


def test_help_tells_the_defaults_of_the_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for data in TASKS:
        with pytest.raises(SystemExit):
            call(monkeypatch, label_points, "--data", data, "--help")
        printed = " ".join(capsys.readouterr().out.split())
        assert f"(default: {TASKS[data].steps})" in printed
        assert f"out/labels-{data}" in printed
