"""Memory of a training step; measured in a process that has done nothing else."""

from __future__ import annotations

from benchmarks.layer import Layer
from benchmarks.measure import peak_memory
from benchmarks.outcome import Figures


def of_training_step(layer: Layer) -> Figures:
    step = layer.whole().step
    step()  # what stays for good, threads and the like, is not the step's
    peak = peak_memory(step)
    return {
        "points": len(layer),
        "peak_bytes": peak,
        "peak_over_query": peak / layer.x_bytes,
    }
