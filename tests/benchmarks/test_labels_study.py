"""The comparison of networks that label points, on little data."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import labels
from examples.labels.model import PointLabeler, count_parameters
from examples.labels.tasks import TASKS, Options

pytest.importorskip("spconv")


@pytest.mark.parametrize("data", ["digits", "hits"])
def test_baselines_have_no_more_parameters(data: str) -> None:
    task = TASKS[data]
    most = count_parameters(PointLabeler(task))
    for name in set(labels.networks_for(task)) & set(labels.BASELINES):
        n = count_parameters(labels.make_model(task, name, seed=0))
        assert 0.9 * most < n <= most, name


def test_every_network_trains_for_the_same_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(labels, "seconds_of_a_step", lambda *_: [0.5, 0.25])
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    networks = ("spconv", "azimuth_equal_pairs")
    options = ("--data", "hits", "--hits", 300, "--tests", 1, "--seconds", 0.5, "--out", tmp_path)
    monkeypatch.setattr(sys, "argv", ["labels", *map(str, options), "--networks", *networks])
    labels.main()
    assert threads == [1]  # processor time is that of one thread
    runs = json.loads((tmp_path / "hits.json").read_text())
    assert [run["network"] for run in runs] == list(networks)
    assert [run["steps"] for run in runs] == [1, 2]
    assert all(0 < run["accuracy"] <= 1 for run in runs)
    assert "azimuth_equal_pairs" in capsys.readouterr().out


def test_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "WARM_UPS", 1)
    monkeypatch.setattr(labels, "TIMED", 1)
    task, for_training, _ = TASKS["hits"].open(TASKS["hits"], Options(0, 300))
    models = [labels.make_model(task, network, seed=0) for network in ("neighborhood", "stem")]
    seconds = labels.seconds_of_a_step(models, for_training, batch=1)
    assert len(seconds) == 2
    assert all(0 < each < 60 for each in seconds)
