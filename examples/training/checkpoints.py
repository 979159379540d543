"""Checkpoints of a run: weights for inference, and the state to resume training from."""

from __future__ import annotations

import contextlib
import io
import itertools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.training.folder import write_file

WEIGHTS, STATE = "model.safetensors", "training_state.pt"
STATE_VERSION = 2
"""Version of the training state.

Version 2 has its number, and the optimizer's state in the present order of the parameters. The
first version has neither.
"""
_PARTS = {
    **{"config": dict, "metadata": dict, "losses": list},
    **{"model": dict, "optimizer": dict, "scaler": dict},
}


class CheckpointError(ValueError):
    """A file of a checkpoint cannot be used; the message names it."""


class DamagedFileError(CheckpointError):
    """A file is incomplete, or its content was changed."""


def save_weights(folder: Path, weights: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes ``model.safetensors`` with ``metadata`` in its header."""
    from safetensors.torch import save

    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    write_file(folder / WEIGHTS, save(contiguous, metadata))


def load_weights(folder: Path, model: nn.Module) -> None:
    """Loads the weights in ``model.safetensors`` into ``model``.

    Raises:
        DamagedFileError: the file is damaged.
    """
    from safetensors.torch import load_file

    with _damage_of_weights(folder / WEIGHTS):
        weights = load_file(folder / WEIGHTS)
    model.load_state_dict(weights)


def read_metadata(folder: Path) -> dict[str, str]:
    """Reads the metadata in the header of ``model.safetensors``.

    Raises:
        DamagedFileError: the file is damaged.
    """
    from safetensors import safe_open

    with _damage_of_weights(folder / WEIGHTS), safe_open(folder / WEIGHTS, "pt") as file:
        metadata: dict[str, str] | None = file.metadata()
    return metadata or {}


@contextlib.contextmanager
def _damage_of_weights(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise DamagedFileError(f"{path}: expected weights, got a damaged file ({error})") from error


def save_state(
    folder: Path,
    state: Mapping[str, Any],
    before_replacing: Callable[[], object] | None = None,
) -> None:
    """Writes ``training_state.pt``: tensors, numbers, strings, and lists, tuples and dicts.

    Args:
        folder: for the file.
        state: by name.
        before_replacing: called when the state is written and the file still is as before.
    """
    content = io.BytesIO()
    torch.save({"version": STATE_VERSION, **state}, content)
    write_file(folder / STATE, content.getvalue(), before_replacing)


def load_state(folder: Path, device: torch.device) -> dict[str, Any]:
    """Reads ``training_state.pt``, without executing any code in it.

    Raises:
        DamagedFileError: the file is damaged, or parts of the state are missing.
        CheckpointError: the state has another version.
    """
    path = folder / STATE
    state = _read_state(path, device)
    version = state.pop("version", None)
    if not isinstance(version, int) or version != STATE_VERSION:
        found = "a state without version" if version is None else f"version {version}"
        raise CheckpointError(
            f"{path}: expected a training state of version {STATE_VERSION}, got {found}, whose "
            "optimizer does not fit; start without --resume, which keeps this file under another "
            "name, or resume with the version of the example that wrote it"
        )
    wrong = [name for name, kind in _PARTS.items() if not isinstance(state.get(name), kind)]
    if wrong or not isinstance(state["config"].get("steps"), int):
        raise _damage(path, f"without {', '.join(wrong) or 'steps'}")
    return state


def _read_state(path: Path, device: torch.device) -> dict[str, Any]:
    content = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(content) as archive:
            broken = archive.testzip()  # torch does not compare the checksums
        if broken is not None:
            raise ValueError(f"wrong checksum of {broken}")
        content.seek(0)
        state = torch.load(content, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"a {type(state).__name__}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any type, depending on which bytes are wrong
        raise _damage(path, _first_sentence(error)) from error
    return state


def _damage(path: Path, what: str) -> DamagedFileError:
    return DamagedFileError(
        f"{path}: expected a training state, got a damaged file ({what}); "
        "start without --resume, which keeps this file under another name"
    )


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0].split("\n")[0] or type(error).__name__


def rename_existing(folder: Path, damaged: bool = False) -> list[Path]:
    """Renames both files with the first unused number, such as ``training_state.1.pt``.

    Args:
        folder: with the files.
        damaged: append ``.damaged`` to the name of the training state.
    """
    for number in itertools.count(1):
        files = {folder / name: _numbered(folder / name, number) for name in (STATE, WEIGHTS)}
        if damaged:
            state = files[folder / STATE]
            files[folder / STATE] = state.with_name(f"{state.name}.damaged")
        if not any(path.exists() for path in files.values()):
            break
    moved = [(path, aside) for path, aside in files.items() if path.exists()]
    for path, aside in moved:
        path.rename(aside)
    return [aside for _, aside in moved]


def _numbered(path: Path, number: int) -> Path:
    return path.with_suffix(f".{number}{path.suffix}")
