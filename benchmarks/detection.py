"""Measures the detector of the demo: ``python -m benchmarks.detection shares|processes|study``.

``shares``: how much of a training step is not attention, projections or feed-forward maps, part by
part. Their backward passes are not in there; an upper bound with these is the time of all ops but
those of attention, projections and feed-forward maps, in both passes, by PyTorch's profiler.
``processes``: the difference of the losses of one process and of two, which train in float64 on the
same canvases. ``study``: average precision, time and memory of both attentions over some seeds.
"""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

import torch

from benchmarks.report import table
from examples.canvas import load_digits
from examples.digits.model import DigitDetector
from examples.digits.scenes import Scenes, split_digits
from examples.training.checkpoints import load_state
from examples.training.loop import Config, train
from examples.training.processes import spawn_processes
from vicinal import FeaturePyramid
from vicinal.detr import DenoisingQueryGenerator, PointStem, SetCriterion, decoder, selection
from vicinal.nn import block

WARM_UPS = 5  # steps
PARTS = (
    ("batches", Scenes, "batch"),
    ("plans", block, "plan_neighborhoods"),
    ("windows of the stem", PointStem, "_windows"),
    ("pooling", FeaturePyramid, "from_points"),
    ("choice of queries", selection, "top_k_per_image"),
    ("denoising queries", DenoisingQueryGenerator, "forward"),
    ("checks", decoder, "check_object_queries"),
    ("matching and losses", SetCriterion, "forward"),
    ("optimizer", torch.nn.utils, "clip_grad_norm_"),
    ("optimizer", torch.optim.AdamW, "step"),
)
INSIDE = re.compile(
    r"aten::(mm|addmm_?|bmm|baddbmm|gelu(_backward)?|native_layer_norm(_backward)?)"
    r"|.*vicinal_*:*(neighborhood_attention|rotate|project).*|.*scaled_dot_product.*"
)


def watched(seconds: dict[str, float], name: str, owner: Any, attribute: str) -> Any:
    """A context that sums the time of ``owner.attribute``, outside of other watched calls."""
    call = getattr(owner, attribute)

    def timed(*arguments: Any, **options: Any) -> Any:
        if "inside" in seconds:
            return call(*arguments, **options)
        start = seconds["inside"] = time.perf_counter()
        result = call(*arguments, **options)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        del seconds["inside"]
        return result

    return mock.patch.object(owner, attribute, timed)


def shares(steps: int, batch: int) -> dict[str, float]:
    """The share of each part in ``steps`` training steps, after a warm-up."""
    model, scenes = DigitDetector(), Scenes(split_digits(load_digits())[0], 0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    watched_seconds: dict[str, float] = {}

    def step(number: int) -> None:
        losses = model(scenes.batch(range(number * batch, (number + 1) * batch)))
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with contextlib.ExitStack() as patches:
        for name, owner, attribute in PARTS:
            patches.enter_context(watched(watched_seconds, name, owner, attribute))
        for number in range(WARM_UPS):
            step(number)
        watched_seconds.clear()
        start = time.perf_counter()
        for number in range(steps):
            step(WARM_UPS + number)
        whole = time.perf_counter() - start
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        for _ in range(3):
            step(0)
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    inside = sum(time for name, time in spent.items() if INSIDE.fullmatch(name))
    figures = {name: seconds / whole for name, seconds in watched_seconds.items()}
    together = {"together": sum(figures.values()), "at most": 1 - inside / sum(spent.values())}
    return figures | together | {"seconds of a step": whole / steps}


def processes(steps: int, batch: int) -> float:
    """The largest relative difference of the losses over all steps."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(n)) for n in (1, 2)]
        for n, folder in enumerate(folders, start=1):
            spawn_processes(n, _train, steps, batch, folder)
        one, two = (load_state(folder, torch.device("cpu"))["losses"] for folder in folders)
    pairs = [(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a]
    return float(max(abs(b - a) / abs(a) for a, b in pairs))


def _train(device: torch.device, steps: int, batch: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = DigitDetector().double().to(device)
    scenes = Scenes(split_digits(load_digits())[0], 0)
    train(model, scenes.batch, Config(steps=steps, batch=batch), folder)


def study(seeds: Sequence[int], steps: int, folder: Path) -> str:
    """Trains with each attention and seed, one after another; a table of all runs and means."""
    rows: list[tuple[str, ...]] = []
    for attention in ("neighborhood", "deformable"):
        runs: dict[str, tuple[float, ...]] = {}
        for seed in seeds:
            out = folder / f"{attention}-{seed}"
            command = [sys.executable, "-m", "examples.detect_digits", "--attention", attention]
            command += ["--seed", str(seed), "--steps", str(steps), "--out", str(out)]
            subprocess.run(command, check=True)
            run = json.loads((out / "figures.json").read_text())
            step, peak = sum(run["seconds_of_a_step"].values()), run["peak_memory"] / 2**20
            runs[str(seed)] = run["ap50"], run["ap75"], run["ap"], step, peak
        runs["mean"] = tuple(map(mean, zip(*runs.values(), strict=True)))
        rows += [(attention, name, *(f"{x:.3f}" for x in run)) for name, run in runs.items()]
    return table(("", "seed", "AP50", "AP75", "AP", "s a step", "peak MiB"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__)
    parser.add_argument("what", choices=("shares", "processes", "study"))
    parser.add_argument("--steps", type=int, help="of training; default: 30, 20, 700")
    parser.add_argument("--batch", type=int, default=4, help="canvases of a step; not for study")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/study"))
    arguments = parser.parse_args()
    if arguments.what == "shares":
        for name, value in shares(arguments.steps or 30, arguments.batch).items():
            print(f"{name:20} {value:7.3f}")
    elif arguments.what == "processes":
        print(processes(arguments.steps or 20, arguments.batch))
    else:
        print(study(arguments.seeds, arguments.steps or 700, arguments.out))


if __name__ == "__main__":
    main()
