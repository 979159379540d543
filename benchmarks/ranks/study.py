"""Strong and weak scaling: ranks train an encoder on one scene, in turn with fewer ranks."""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from benchmarks.measure import peak_memory
from benchmarks.outcome import CaseSkipped, DisagreementError, Figures
from benchmarks.ranks.memory import peak_of_tensors
from benchmarks.ranks.meter import metered, synchronize
from benchmarks.ranks.settings import RanksSettings
from benchmarks.ranks.share import Share
from benchmarks.scenes import Scene, of_density

Cases = dict[str, Figures]
TOLERANCE = {"float64": 1e-12, "float32": 1e-4}  # of gradients, relative to one process
ROUGH = 2e-2  # of other dtypes
PEAKS = {"memory_over_one": "peak_bytes", "resident_over_one": "resident_peak_bytes"}


class Report(NamedTuple):
    """What a rank measured of its share."""

    points: int
    pairs: int
    halo: int  # points that came from other ranks
    seconds: list[float]  # of each round
    collective_seconds: float
    metered_seconds: float  # of the step that was watched
    row_bytes: int
    plan_bytes: int
    peak_bytes: int  # of tensors
    resident_peak_bytes: int | None  # of the process, less what it had before the scene
    gradient: float  # the norm of that of a weight, the same on all ranks


def measure(device: torch.device, settings: RanksSettings) -> Cases:
    """All cases. Every rank of the world calls it; the figures are on rank 0 alone."""
    groups = {n: dist.new_group(range(n)) for n in settings.ranks}
    one = of_density(settings.tracks)
    found = compare("strong", lambda n: one, settings, groups, device)
    found |= compare("interior", lambda n: one, settings, groups, device, interior_first=True)
    found |= compare("attention", lambda n: one, settings, groups, device, feed_forward=False)
    grown = {n: of_density(n * settings.tracks) for n in settings.ranks}
    return found | compare("weak", grown.__getitem__, settings, groups, device)


def measure_to(device: torch.device, settings: RanksSettings, file: Path) -> None:
    """`measure`; rank 0 writes the figures as JSON."""
    found = measure(device, settings)
    if dist.get_rank() == 0:
        file.write_text(json.dumps(found))


def compare(
    name: str,
    scene_of: Callable[[int], Scene],
    settings: RanksSettings,
    groups: Mapping[int, ProcessGroup | None],
    device: torch.device,
    **options: bool,
) -> Cases:
    """A case per number of ranks, whose steps alternate. On rank 0; nothing on the others.

    ``options`` are those of `Share`.
    """
    rank = dist.get_rank()
    if rank == 0:
        print(f"{name} ...", file=sys.stderr, flush=True)
    shares = {
        n: Share(scene_of(n), settings, group if n > 1 else None, device, **options)
        for n, group in groups.items()
        if rank < n
    }
    seconds: dict[int, list[float]] = {n: [] for n in shares}
    for _ in range(1 + settings.rounds):
        for n in groups:
            dist.barrier()  # ranks that have no share wait here
            if n in shares:
                seconds[n].append(_time(shares[n], device))
    found: Cases = {}
    for n, group in groups.items():
        dist.barrier()
        if n not in shares:
            continue
        report = _report(shares.pop(n), seconds[n][1:], device)
        reports: list[Any] = [None] * n
        dist.all_gather_object(reports, report, group=group)
        if rank == 0:
            found[f"{name}/{n}"] = summarize(reports, settings)
    return with_ratios(found, name, TOLERANCE.get(settings.dtype, ROUGH))


def summarize(reports: list[Report], settings: RanksSettings) -> Figures:
    """The figures of all ranks together."""
    points, pairs = [r.points for r in reports], [r.pairs for r in reports]
    halo, size = sum(r.halo for r in reports), getattr(torch, settings.dtype).itemsize
    rounds = [max(round) for round in zip(*(r.seconds for r in reports), strict=True)]
    figures: Figures = {
        "ranks": len(reports),
        "points": sum(points),
        "step_seconds": statistics.median(rounds),
        "seconds": " ".join(f"{t:.3f}" for t in rounds),
        "imbalance_of_points": max(points) * len(points) / sum(points),
        "imbalance_of_pairs": max(pairs) * len(pairs) / sum(pairs),
        "gradient": reports[0].gradient,
        "peak_bytes": max(r.peak_bytes for r in reports),
    }
    residents = [r.resident_peak_bytes for r in reports if r.resident_peak_bytes is not None]
    if residents:
        figures["resident_peak_bytes"] = max(residents)
    if len(reports) == 1:
        return figures
    collectives = [r.collective_seconds for r in reports]
    figures |= {
        "halo_over_own": halo / sum(points),
        "row_bytes": sum(r.row_bytes for r in reports),
        "plan_bytes": sum(r.plan_bytes for r in reports),
        "collective_seconds": max(collectives),
        "least_collective_seconds": min(collectives),
        "collective_share": min(collectives) / max(r.metered_seconds for r in reports),
    }
    if halo:
        per_point = sum(r.row_bytes for r in reports) / halo / settings.layers
        figures["bytes_per_halo_point_and_layer"] = per_point
        figures["bytes_over_bar"] = per_point / (2 * settings.embed_dim * size)
    return figures


def with_ratios(found: Cases, name: str, tolerance: float) -> Cases:
    """Adds what compares with one process, of the same rounds. ``speedup`` is of points per second.

    Raises:
        DisagreementError: the gradient on the same scene differs by more than ``tolerance``.
    """
    one = found.get(f"{name}/1")
    if one is None:
        return found
    for figures in found.values():
        pairs = zip(_numbers(one["seconds"]), _numbers(figures["seconds"]), strict=True)
        more = float(figures["points"]) / float(one["points"])
        figures["speedup"] = more * statistics.median(a / b for a, b in pairs)
        for ratio, peak in PEAKS.items():
            if peak in figures:
                figures[ratio] = float(figures[peak]) / float(one[peak])
        off = abs(float(figures["gradient"]) / float(one["gradient"]) - 1)
        if figures["points"] == one["points"] and not off <= tolerance:
            raise DisagreementError(
                f"{name}: gradients of {figures['ranks']} ranks differ by {off}"
            )
    return found


def _numbers(text: float | str) -> list[float]:
    return [float(part) for part in str(text).split()]


def _time(share: Share, device: torch.device) -> float:
    """Seconds of a step, which the ranks start together."""
    if share.group:
        dist.barrier(share.group)
    synchronize(device)
    start = time.perf_counter()
    share.step()
    synchronize(device)
    return time.perf_counter() - start


def _report(share: Share, seconds: list[float], device: torch.device) -> Report:
    plan = share.make_plan()
    points, pairs = len(share.pyramid), int(plan.counts().sum())
    halo = plan.n_points - points
    del plan
    if share.group:
        dist.barrier(share.group)
    with metered(device) as meter:
        start = time.perf_counter()
        share.step()
        synchronize(device)
        whole = time.perf_counter() - start
    gradient = share.gradient_norm()
    resident, inputs = None, share.input_bytes()
    if device.type == "cuda":
        peak = peak_memory(share.step, device).of_call
    else:
        peak = peak_of_tensors(share.step)
        with contextlib.suppress(CaseSkipped):
            resident = inputs + peak_memory(share.step, device).of_call
    return Report(
        points, pairs, halo, seconds, meter.seconds, whole, meter.row_bytes, meter.plan_bytes,
        inputs + peak, resident, gradient,
    )  # fmt: skip
