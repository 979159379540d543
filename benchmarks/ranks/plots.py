"""The plots of the scaling study."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.goals import Goal
from benchmarks.plots import FAINT, FORWARD, INK, MEMORY, STEP, WHOLE, finish, found_in
from benchmarks.ranks import model
from benchmarks.report import Outcomes

STUDIES = {
    "strong": ("one scene, encoder", STEP, "o"),
    "interior": ("one scene, interior queries first", INK, "^"),
    "attention": ("one scene, attention blocks alone", FORWARD, "s"),
    "weak": ("a scene that grows with the ranks, encoder", MEMORY, "D"),
}
SCENES = {"tracks": ("tracks", WHOLE), "lidar": ("LiDAR scan", FORWARD)}


def draw(outcomes: Outcomes, stem: Path, goals: Sequence[Goal]) -> Iterator[Path]:
    """Saves each plot that the outcomes suffice for, as ``stem`` and its subject."""
    parts = model.parts_of({name: dict(case.figures) for name, case in outcomes.items()})
    figures = {"measured": _measured(outcomes, goals)}
    if parts is not None:
        figures["model"] = _model(parts)
    for subject, figure in figures.items():
        path = stem.with_name(f"{stem.name}-{subject}.png")
        figure.savefig(path, dpi=160)
        yield path


def _measured(outcomes: Outcomes, goals: Sequence[Goal]) -> Figure:
    """Points per second over the number of ranks, and the halo over the number of parts."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    speedups, halos = figure.subplots(1, 2)
    for name, (label, color, marker) in STUDIES.items():
        cases = found_in(outcomes, f"{name}/").values()
        ranks = [case.number("ranks") for case in cases]
        reached = [case.number("speedup") for case in cases]
        if ranks:
            speedups.plot(ranks, reached, f"{marker}-", color=color, label=label)
            speedups.plot(ranks, ranks, "--", color=FAINT, label="as many times as ranks")
            _ticks(speedups, ranks)
    speedups.set(xlabel="ranks, a thread each", ylabel="points per second over one process")
    for name, (label, color) in SCENES.items():
        cases = found_in(outcomes, f"parts/{name}/").values()
        shares = [case.number("halo_over_own") for case in cases]
        numbers = [case.number("parts") for case in cases]
        if numbers:
            halos.plot(numbers, shares, "o-", color=color, label=f"halo, {label}")
            halos.set(xscale="log", yscale="log")
    for goal in goals:
        if goal.figure == "halo_over_own":
            halos.plot(float(goal.case.split("/")[-1]), goal.bar, "v", color=INK, label="bar")
    _ticks(halos, [2**i for i in range(1, 10)])
    halos.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2])
    halos.yaxis.set_minor_formatter(NullFormatter())
    halos.set(xlabel="parts", ylabel="halo over own points")
    finish(figure, columns=3)
    return figure


def _model(parts: model.Parts) -> Figure:
    """Efficiency over GPUs, and the share of exchanges over points per GPU."""
    given = model.Assumptions()
    figure = Figure(figsize=(9, 4), layout="constrained")
    efficiency, shares = figure.subplots(1, 2)
    for network, color in zip(model.NETWORKS, (FORWARD, STEP), strict=True):
        for n_points, style in zip(model.MILLIONS, ("o--", "o-"), strict=True):
            reached = [model.efficiency(n_points, n, parts, network, given) for n in model.GPUS]
            label = f"{n_points:,} points, {network.name}"
            efficiency.plot(model.GPUS, reached, style, color=color, label=label)
        points = [1000 * 2 ** (i / 4) for i in range(45)]
        share = [model.exposed_share(n, parts, network, given) for n in points]
        shares.plot(points, share, color=color, label=f"exchanges, {network.name}")
    shares.axhline(model.EXPOSED, color=FAINT, linestyle="--", label="a tenth of the computation")
    efficiency.set(xscale="log", xlabel="GPUs", ylabel="efficiency of a step", ylim=(0, 1.05))
    _ticks(efficiency, model.GPUS)
    shares.set(xscale="log", yscale="log", xlabel="points per GPU")
    shares.set(ylabel="exchanges over computation")
    finish(figure, columns=3)
    figure.suptitle("A model, not a measurement: bfloat16, six layers on H200", size=11)
    return figure


def _ticks(axes: Axes, numbers: Sequence[float]) -> None:
    axes.set_xticks(list(numbers), [f"{n:,.0f}" for n in numbers])
    axes.xaxis.set_minor_formatter(NullFormatter())
