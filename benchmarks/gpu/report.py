"""The figures of the study on a GPU as tables for the terminal."""

from __future__ import annotations

import re

from benchmarks.gpu.goals import GOALS
from benchmarks.outcome import Outcome
from benchmarks.report import NONE, Outcomes, goals, peers, plain, stages, table

SETTING = re.compile(r"(?:forward_seconds|problem) (\d+)x(\d+)")
PASSES = ("forward", "backward")


def report(outcomes: Outcomes) -> str:
    """All tables, one after another."""
    parts = {
        "What the library is held to": goals(outcomes, GOALS),
        "The attention and its floor": plain(outcomes, "attention/tracks"),
        "The plan, as launched and replayed as a CUDA graph": plain(outcomes, "plan/tracks"),
        "The block and its floor": plain(outcomes, "compute/tracks"),
        "Training steps replayed as CUDA graphs": plain(outcomes, "replayed/tracks"),
        "Stages of a block, each timed alone, in ms": stages(outcomes),
        "Peers at the same work, times in the middle of several": peers(outcomes, "peers/"),
        "A training step of a million queries": plain(outcomes, "million"),
        "Scattered queries among many points, in us, by rows of a tile": decoders(outcomes),
        "Attention by rows of a tile, columns of a block and warps, in ms": sweeps(outcomes),
    }
    return "\n\n".join(f"{title}\n{body}" for title, body in parts.items() if body)


def decoders(outcomes: Outcomes) -> str:
    rows = [
        (name.removeprefix("decoder/"), *_decoder_cells(outcome))
        for name, outcome in outcomes.items()
        if name.startswith("decoder/")
    ]
    header = ("queries", "forward, 1", "16", "step, 1", "16", "chosen")
    return table(header, rows) if rows else ""


def _decoder_cells(outcome: Outcome) -> tuple[str, ...]:
    if outcome.problem is not None:
        return (*[NONE] * 4, outcome.problem)
    kinds = [f"{kind}_seconds {rows}" for kind in ("forward", "step") for rows in (1, 16)]
    cells = (f"{1e6 * outcome.number(kind):,.1f}" for kind in kinds)
    return (*cells, f"{outcome.number('rows_chosen'):.0f}")


def sweeps(outcomes: Outcomes) -> str:
    """All settings, fastest first by the sum of both passes; at the end those that failed."""
    rows = [row for name in outcomes if name.startswith("sweep/") for row in _sweep(name, outcomes)]
    rows.sort(key=lambda row: row[0])
    header = ("rows", "block", "warps", "forward", "backward", "")
    return table(header, [cells for _, cells in rows]) if rows else ""


def _sweep(name: str, outcomes: Outcomes) -> list[tuple[float, tuple[str, ...]]]:
    tile, outcome = name.removeprefix("sweep/"), outcomes[name]
    if outcome.problem is not None:
        return [(float("inf"), (tile, *[NONE] * 4, outcome.problem))]
    found = []
    for setting in filter(None, map(SETTING.fullmatch, outcome.figures)):
        block, warps = setting.groups()
        seconds = [outcome.find(f"{kind}_seconds {block}x{warps}") for kind in PASSES]
        problem = str(outcome.figures.get(f"problem {block}x{warps}", ""))
        cells = (NONE if x is None else f"{1e3 * x:.3f}" for x in seconds)
        total = sum(float("inf") if x is None else x for x in seconds)
        found.append((total, (tile, block, warps, *cells, problem)))
    return found
