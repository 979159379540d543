"""The detector of the demo, measured: ``python -m benchmarks.detection shares``, and so on.

``shares`` tells how much of a training step goes into what is not attention, projections or
feed-forward maps: making batches, finding windows and plans, choosing queries, matching and losses,
the optimizer. What of these runs in the backward pass is not among them, so there is a bound from
above too: the time of all but the ops that attention, projections and feed-forward maps are made
of, in both passes, as PyTorch's profiler tells it.

``processes`` trains in float64 on one process and on two, of the same canvases, and tells how far
their losses are apart.

``study`` trains with both attentions, all else equal, over some seeds, one run after another, and
writes a table of average precision, time and memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch

from examples.canvas import load_digits
from examples.digits.checkpoints import load_state
from examples.digits.model import DigitDetector
from examples.digits.processes import spawn_processes
from examples.digits.scenes import Scenes, split_digits
from examples.digits.training import Config, train
from vicinal import FeaturePyramid
from vicinal.detr import DenoisingQueryGenerator, PointStem, SetCriterion, decoder, selection
from vicinal.nn import block

ATTENTIONS = ("neighborhood", "deformable")
INSIDE = re.compile(
    r"aten::(mm|addmm_?|bmm|baddbmm|gelu(_backward)?|native_layer_norm(_backward)?)"
    r"|.*vicinal_*:*(neighborhood_attention|rotate|project).*|.*scaled_dot_product.*"
)
COLUMNS = "| attention | seed | AP50 | AP75 | AP | s a step | peak MiB |\n|" + " --- |" * 7


class Watch:
    """Seconds spent in the outermost of the calls that it watches, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = False

    def over(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, watched."""

        @functools.wraps(call)
        def watched(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return call(*arguments, **options)
            self._inside, start = True, time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self._inside = False
                spent = time.perf_counter() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

        return watched

    def patch(self, name: str, owner: Any, attribute: str) -> Any:
        """Watches ``owner.attribute`` while the context is open."""
        return mock.patch.object(owner, attribute, self.over(name, getattr(owner, attribute)))


def shares(steps: int, batch: int) -> None:
    """Prints the share of each part in ``steps`` training steps, after some that warm up."""
    watch = Watch()
    model, scenes = DigitDetector(), Scenes(split_digits(load_digits())[0], 0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    make, change = watch.over("batches", scenes.batch), watch.over("optimizer", update)
    pooling = FeaturePyramid.from_points
    with (
        watch.patch("plans", block, "plan_neighborhoods"),
        watch.patch("windows of the stem", PointStem, "_windows"),
        mock.patch.object(FeaturePyramid, "from_points", watch.over("pooling", pooling)),
        watch.patch("choice of queries", selection, "top_k_per_image"),
        watch.patch("denoising queries", DenoisingQueryGenerator, "forward"),
        watch.patch("checks", decoder, "check_object_queries"),
        watch.patch("matching and losses", SetCriterion, "forward"),
    ):
        for number in range(-5, steps):
            if number == 0:
                watch.seconds.clear()
                start = time.perf_counter()
            losses = model(make(range((number + 5) * batch, (number + 6) * batch)))
            torch.stack(list(losses.values())).sum().backward()
            change()
    whole = time.perf_counter() - start
    for name, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1]):
        print(f"{name:24} {1000 * seconds / steps:7.1f} ms  {seconds / whole:6.1%}")
    outside = sum(watch.seconds.values())
    print(f"{'outside':24} {1000 * outside / steps:7.1f} ms  {outside / whole:6.1%}")
    print(f"{'a step':24} {1000 * whole / steps:7.1f} ms")

    def step() -> None:
        losses = model(scenes.batch(range(batch)))
        torch.stack(list(losses.values())).sum().backward()
        update()

    print(f"{'outside, at most':24} {'':10}  {_share_of_other_ops(step):6.1%}")


def _share_of_other_ops(step: Callable[[], None]) -> float:
    """Of the time of a few steps, that of all ops but those named in `INSIDE`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(3):
            step()
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    inside = sum(time for name, time in spent.items() if INSIDE.fullmatch(name))
    return float(1 - inside / sum(spent.values()))


def processes(steps: int, batch: int) -> None:
    """Prints the largest relative difference of the losses over all steps."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n_processes in (1, 2):
            spawn_processes(n_processes, _train_apart, steps, batch, folder / str(n_processes))
        one, two = (load_state(folder / n, torch.device("cpu"))["losses"] for n in ("1", "2"))
    apart = [
        max(abs(ours[name] - theirs[name]) / abs(theirs[name]) for name in theirs)
        for ours, theirs in zip(two, one, strict=True)
    ]
    print(f"{len(apart)} steps, {len(one[0])} losses each: at most {max(apart):.1e} apart")


def _train_apart(device: torch.device, steps: int, batch: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = DigitDetector().double().to(device)
    scenes = Scenes(split_digits(load_digits())[0], 0)
    train(model, scenes.batch, Config(steps=steps, batch=batch), folder)


def study(seeds: list[int], steps: int, folder: Path) -> None:
    """Trains with both attentions by every seed and writes ``study.md`` beside their figures."""
    rows = []
    for seed in seeds:
        for attention in ATTENTIONS:
            out = folder / f"{attention}-{seed}"
            command = [sys.executable, "-m", "examples.detect_digits", "--attention", attention]
            command += ["--seed", str(seed), "--steps", str(steps), "--out", str(out)]
            subprocess.run(command, check=True)
            rows.append(json.loads((out / "figures.json").read_text()))
    table = "\n".join([COLUMNS, *map(_row, rows)])
    print(table)
    (folder / "study.md").write_text(table + "\n")
    for attention in ATTENTIONS:
        runs = [row for row in rows if row["attention"] == attention]
        means = {name: mean(run[name] for run in runs) for name in ("ap50", "ap75", "ap")}
        print(attention, " ".join(f"{name} {value:.3f}" for name, value in means.items()))


def _row(figures: dict[str, Any]) -> str:
    step = sum(figures["seconds_of_a_step"].values())
    cells = [figures["attention"], str(figures["seed"])]
    cells += [f"{figures[name]:.3f}" for name in ("ap50", "ap75", "ap")]
    cells += [f"{step:.3f}", f"{figures['peak_memory'] / 2**20:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__)
    parser.add_argument("what", choices=("shares", "processes", "study"))
    parser.add_argument(
        "--steps", type=int, help="of training; 30 for shares, 20 for processes, 600 for the study"
    )
    parser.add_argument(
        "--batch", type=int, default=4, help="canvases of a step, not for the study"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    arguments = parser.parse_args()
    if arguments.what == "shares":
        shares(arguments.steps or 30, arguments.batch)
    elif arguments.what == "processes":
        processes(arguments.steps or 20, arguments.batch)
    else:
        study(arguments.seeds, arguments.steps or 560, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
