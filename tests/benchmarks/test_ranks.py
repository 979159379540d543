"""The scaling study counts what ranks send, cuts scenes as the library does, and reports it."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed.cluster import Cluster
from torch.distributed import ProcessGroup

from benchmarks.outcome import DisagreementError, Figures
from benchmarks.ranks import __main__ as command
from benchmarks.ranks import model
from benchmarks.ranks.memory import peak_of_tensors
from benchmarks.ranks.meter import metered
from benchmarks.ranks.parts import CutScene, measure_parts, world_of_one
from benchmarks.ranks.settings import SETTINGS
from benchmarks.ranks.study import Cases, measure, with_ratios
from benchmarks.scenes import particle_tracks
from vicinal import FeaturePyramid, plan_neighborhoods

CPU = torch.device("cpu")
QUICK = SETTINGS["quick"]


def study_of(group: ProcessGroup) -> Cases:
    return measure(CPU, QUICK)


def exchange(group: ProcessGroup, is_async: bool) -> tuple[int, int, float, list[float]]:
    """Rank 0 sends two rows to rank 1, which sends one back; both keep some."""
    send = [[3, 2], [1, 4]][dist.get_rank(group)]
    receive = [[3, 1], [2, 4]][dist.get_rank(group)]
    rows = torch.full((5, 3), float(dist.get_rank(group)))
    with metered(CPU) as meter:
        came = rows.new_empty(sum(receive), 3)
        work = dist.all_to_all_single(came, rows, receive, send, group=group, async_op=is_async)
        if is_async:
            work.wait()
        dist.all_to_all_single(rows[:2].long(), rows[:2].long(), group=group)
    return meter.row_bytes, meter.plan_bytes, meter.seconds, came[:, 0].tolist()


@pytest.mark.parametrize("is_async", [False, True])
def test_bytes_to_other_ranks_are_counted(cluster: Cluster, is_async: bool) -> None:
    first, second = cluster.run(2, exchange, is_async)
    assert first[0] == 2 * 3 * 4
    assert second[0] == 1 * 3 * 4
    assert first[1] == second[1] == 3 * 8  # one row of integers to the other rank
    assert min(first[2], second[2]) > 0
    assert first[3] == [0, 0, 0, 1]


def test_ranks_give_figures(cluster: Cluster) -> None:
    found, *others = cluster.run(4, study_of)
    assert others == [{}, {}, {}]
    assert set(found) == {
        f"{name}/{n}" for name in ("strong", "interior", "attention", "weak") for n in (1, 2, 4)
    }
    for name, figures in found.items():
        assert float(figures["step_seconds"]) > 0
        if not name.endswith("/1"):
            assert figures["bytes_over_bar"] == 1
            assert 0 < float(figures["halo_over_own"]) < 1
            assert 0 < float(figures["collective_share"]) < 1
            assert float(figures["speedup"]) > 0
            assert float(figures["memory_over_one"]) > 0
    assert found["strong/4"]["points"] == found["strong/1"]["points"]
    assert float(found["weak/4"]["points"]) > 3 * float(found["weak/1"]["points"])


def test_gradients_that_differ_stop_the_study() -> None:
    def figures(gradient: float, points: int = 9) -> Figures:
        return {"ranks": 2, "points": points, "seconds": "2.0 4.0", "gradient": gradient}

    found = with_ratios({"a/1": figures(1.0), "a/2": figures(3.0, points=18)}, "a", 1e-4)
    assert found["a/2"]["speedup"] == 2  # twice the points in the same time
    with pytest.raises(DisagreementError, match="gradients"):
        with_ratios({"a/1": figures(1.0), "a/2": figures(1.001)}, "a", 1e-4)
    with pytest.raises(DisagreementError, match="gradients"):
        with_ratios({"a/1": figures(1.0), "a/2": figures(float("nan"))}, "a", 1e-4)


def test_the_halo_of_a_part_has_all_that_its_windows_hold() -> None:
    scene = particle_tracks(8, size=96)
    values = torch.zeros(len(scene.coordinates), 1)
    pyramid = FeaturePyramid(values, scene.coordinates, scene.level_shapes, 1)
    cut = CutScene(pyramid, scene.windows)
    with world_of_one():
        parts = [cut.own(box) for box in cut.boxes(5)]
    assert torch.stack(parts).sum(0).eq(1).all()  # each point in one part
    placed = pyramid.positions(), pyramid.batch_offsets(), pyramid
    query, neighbor = plan_neighborhoods(*placed, scene.windows).pairs().unbind(1)
    for own in parts:
        seen = torch.zeros_like(own)
        seen[neighbor[own[query]]] = True
        halo = cut.halo(own)
        assert not (halo & own).any()
        assert (own | halo)[seen].all()


def test_parts_give_figures() -> None:
    found = measure_parts(QUICK)
    assert set(found) == {"parts/tracks/2", "parts/tracks/4"}
    for figures in found.values():
        assert 0 < float(figures["halo_over_own"]) < 1
        assert 1 <= float(figures["imbalance_of_pairs"]) < 2
    assert not dist.is_initialized()


def test_the_peak_of_tensors_is_of_those_that_are_live() -> None:
    def call() -> None:
        for _ in range(3):
            first = torch.zeros(1000, 256)
            second = first + 1
            del first, second

    kept = torch.zeros(1000, 256)
    assert peak_of_tensors(call) == pytest.approx(2 * kept.nbytes, rel=0.01)


PARTS = model.Parts([45_000.0, 11_300.0, 1_410.0], [0.0224, 0.0581, 0.217], [1.05, 1.08, 1.25])


def test_the_model_interpolates_what_was_counted() -> None:
    assert PARTS.halo(11_300) == pytest.approx(0.0581)
    assert 0.0224 < PARTS.halo(20_000) < 0.0581
    assert PARTS.halo(1e6) < 0.01
    assert PARTS.balance(1e6) == pytest.approx(1.05)
    assert PARTS.balance(100) == pytest.approx(1.25)


def test_the_model_breaks_even_where_latency_is_a_tenth() -> None:
    given = model.Assumptions()
    nvlink, infiniband = (model.break_even(PARTS, network, given) for network in model.NETWORKS)
    assert nvlink == pytest.approx(31_000, rel=0.15)
    assert infiniband == pytest.approx(78_000, rel=0.15)
    quick = model.Network("without latency", 0.0, 450e9)
    assert model.break_even(PARTS, quick, given) < nvlink / 2


def test_efficiency_falls_with_the_number_of_gpus() -> None:
    given, network = model.Assumptions(), model.NETWORKS[1]
    reached = [model.efficiency(7e5, n, PARTS, network, given) for n in model.GPUS]
    assert reached == sorted(reached, reverse=True)
    assert 0 < reached[-1] < reached[0] < 1


def run_command(*arguments: object) -> int:
    with mock.patch.object(sys, "argv", ["ranks", *map(str, arguments)]):
        return command.main()


def test_a_study_is_saved_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cases: dict[str, Any] = {
        f"strong/{n}": {"ranks": n, "speedup": 0.9 * n, "points": 10} for n in (1, 2)
    }
    monkeypatch.setattr(command, "run_ranks", lambda settings: dict(cases))
    assert run_command("--size", "quick", "--out", tmp_path) == 0
    (file,) = tmp_path.glob("*.json")
    saved = json.loads(file.read_text())
    assert {"machine", "versions", "commit", "load", "settings"} < set(saved)
    assert saved["cases"]["strong/2"]["figures"]["speedup"] == 1.8
    assert "parts/tracks/4" in saved["cases"]
    plots = {path.stem.rsplit("-", 1)[1] for path in tmp_path.glob("*.png")}
    assert plots == {"measured", "model"}
    assert "two ranks over one" in capsys.readouterr().out
    assert run_command("--show", file, "--out", tmp_path / "again") == 0


def test_a_study_of_gpus_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_command("--device", "cuda") == command.NO_GPU


def test_a_study_of_ranks_needs_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--ranks", 1) == command.TOO_FEW
    assert "--ranks" in capsys.readouterr().err
