"""Command-line arguments that the examples share."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from pathlib import Path


def at_least_1(text: str) -> int:
    """Parses an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return int(text)


def above_0(text: str) -> float:
    """Parses a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def seed(text: str) -> int:
    """Parses a seed for torch, an integer in [0, 2^63)."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to 2^63 - 1, got {text}")
    return int(text)


def require(parser: argparse.ArgumentParser, *modules: str, extras: str = "demo") -> None:
    """Exits with the extras of vicinal to install unless all ``modules`` are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(1, f"The demo needs {', '.join(missing)}: pip install vicinal[{extras}]\n")


def output_folder(text: str) -> Path:
    """Parses the name of a folder, which must not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}; . is the current one")
    return Path(text)


def require_folder(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Creates the output folder of ``--out``; exits if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        parser.error(f"argument --out: {problem}")
    if not os.access(folder, os.W_OK):
        parser.error(f"argument --out: cannot write {folder}")
