"""Errors of the compiled kernel against float64, beside those of plain PyTorch."""

from __future__ import annotations

import torch

from benchmarks.layer import Layer
from benchmarks.outcome import Figures

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.no_grad()
def against_float64(layer: Layer) -> Figures:
    """Error of the block's output, as a part of its norm, and over that of the reference."""
    exact = layer.with_dtype(torch.float64)
    expected = exact.forward(exact.x)
    figures: Figures = {"points": len(layer)}
    for name, dtype in DTYPES.items():
        errors = []
        for backend in ("cpu", "reference"):
            rounded = layer.with_dtype(dtype, backend)
            out = rounded.forward(rounded.x).double()
            errors.append(float((out - expected).norm() / expected.norm()))
        figures[f"{name}_error"] = errors[0]
        figures[f"{name}_error_over_reference"] = errors[0] / errors[1]
    return figures
