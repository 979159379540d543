"""Checkpoints of a run: weights for inference, and the state to resume training from."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS, STATE = "model.safetensors", "training_state.pt"


def save_weights(folder: Path, weights: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes ``model.safetensors`` with ``metadata`` in its header."""
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    with _atomic_write(folder / WEIGHTS) as path:
        save_file(contiguous, path, metadata)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Loads the weights in ``model.safetensors`` into ``model``."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / WEIGHTS))


def read_metadata(folder: Path) -> dict[str, str]:
    """Reads the metadata in the header of ``model.safetensors``."""
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata: dict[str, str] | None = file.metadata()
    return metadata or {}


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes ``training_state.pt``: tensors, numbers, strings, and lists and dicts of them."""
    with _atomic_write(folder / STATE) as path:
        torch.save(dict(state), path)


def load_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """Reads ``training_state.pt``, without executing any code in it."""
    state: dict[str, Any] = torch.load(folder / STATE, map_location=device, weights_only=True)
    return state


def rename_existing(folder: Path) -> list[Path]:
    """Renames both files with the first unused number, such as ``training_state.1.pt``."""
    for number in itertools.count(1):
        files = {folder / name: _numbered(folder / name, number) for name in (STATE, WEIGHTS)}
        if not any(path.exists() for path in files.values()):
            break
    moved = [(path, aside) for path, aside in files.items() if path.exists()]
    for path, aside in moved:
        path.rename(aside)
    return [aside for _, aside in moved]


def _numbered(path: Path, number: int) -> Path:
    return path.with_suffix(f".{number}{path.suffix}")


@contextlib.contextmanager
def _atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces ``path`` once it is completely written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
