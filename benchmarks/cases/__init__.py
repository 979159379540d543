"""What a study measures: every case has a name and gives figures, in a process of its own."""

from collections.abc import Callable
from functools import partial

from benchmarks.baselines import BASELINES
from benchmarks.baselines.comparison import against, agreement
from benchmarks.cases import block, stages, tuning
from benchmarks.layer import Layer
from benchmarks.outcome import RETAINED, Figures
from benchmarks.scenes import handwriting, of_density, tracks_in_volume
from benchmarks.settings import Settings, Tracks

Case = Callable[[], Figures]
Ladder = dict[str, Case]
"""Cases by name, of which the next runs only where one lacks memory."""

MILLION, SPEED = "million", "speed"  # the study runs them only where asked to
BASELINES_ON_GPU = ("gathering", "pairs", "pairs-block", "flex", "flex-sorted")


def all_cases(settings: Settings) -> dict[str, Case]:
    return {name: case for ladder in ladders(settings) for name, case in ladder.items()}


def ladders(settings: Settings) -> list[Ladder]:
    """All cases, in the order in which they run: those that check results come first."""
    return _on_gpu(settings) if settings.backend == "triton" else _on_cpu(settings)


def _on_cpu(s: Settings) -> list[Ladder]:
    few = [_ladder(s, name, [s.few_tracks]) for name in BASELINES if name != "pairs-block"]
    all_tracks = [s.tracks, *((n, s.tracks[1]) for n in s.fewer_tracks)]
    many = [_ladder(s, name, all_tracks) for name in BASELINES if name != "gathering"]
    scenes: dict[str, Callable[[], Layer]] = {
        "tracks": s.layer,
        "volume": lambda: Layer(tracks_in_volume(s.volume[0], size=s.volume[1])),
        "handwriting": lambda: Layer(handwriting(s.digits)),
    }
    grown = {n: lambda n=n: Layer(of_density(n)) for n in s.growing}
    cases: dict[str, Case] = {
        "scaling/time": lambda: block.scaling([grown[n]() for n in s.growing], s.few_repeats),
        "threads": lambda: block.two_threads(s.layer(), s.repeats),
    }
    for name, make in scenes.items():
        cases[f"compute/{name}"] = partial(_on, make, block.compute, s.repeats)
        cases[f"stages/{name}"] = partial(_on, make, stages.stages, s.repeats)
        cases[f"memory/{name}"] = partial(_on, make, block.memory)
    for n, make in grown.items():
        cases[f"scaling/memory/{n}"] = partial(_on, make, block.memory)
    cases |= _common(s)
    # Once more where malloc keeps freed memory.
    known = cases | {name: case for ladder in few for name, case in ladder.items()}
    baselines = [f"baselines/{name}/{s.few_tracks[0]}" for name in ("gathering", "pairs")]
    retained = [*baselines, "compute/tracks", "scaling/time"]
    cases = {RETAINED + name: known[name] for name in retained} | cases
    return few + many + [{name: case} for name, case in cases.items()]


def _on_gpu(s: Settings) -> list[Ladder]:
    cases: dict[str, Case] = {}
    for name in BASELINES_ON_GPU:
        make = partial(s.layer, s.few_tracks, "float32")
        cases[f"agreement/{name}"] = partial(_on, make, agreement, *BASELINES[name])
    measures = (block.attention, block.plan, block.compute, block.replayed, stages.stages)
    for measure in measures:
        cases[f"{measure.__name__}/tracks"] = partial(_on, s.layer, measure, s.repeats)
    cases |= _common(s)
    sweep = partial(_on, s.layer, tuning.sweep, s.few_repeats, s.blocks, s.warps)
    tuned: dict[str, Case] = {f"sweep/{rows}": partial(sweep, rows) for rows in s.tiles}
    all_tracks = [s.tracks, *((n, s.tracks[1]) for n in s.fewer_tracks)]
    compared = [_ladder(s, name, all_tracks) for name in BASELINES_ON_GPU]
    first, last = ([{name: case} for name, case in part.items()] for part in (cases, tuned))
    return first + compared + last


def _common(s: Settings) -> dict[str, Case]:
    return {
        SPEED: partial(_on, s.layer, block.seconds, s.repeats),
        MILLION: lambda: block.training_step(s.layer(s.million), s.few_repeats),
    }


def _ladder(s: Settings, name: str, scenes: list[Tracks]) -> Ladder:
    return {
        f"baselines/{name}/{tracks[0]}": partial(
            _on, partial(s.layer, tracks), against, *BASELINES[name], s.few_repeats
        )
        for tracks in scenes
    }


def _on(make: Callable[[], Layer], measure: Callable[..., Figures], *arguments: object) -> Figures:
    return measure(make(), *arguments)
