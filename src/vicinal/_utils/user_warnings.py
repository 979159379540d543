"""Warnings that name the user's line, however deep in the library they arise."""

import sys
import warnings
from pathlib import Path
from types import FrameType

import torch

_LIBRARIES = Path(__file__).parents[1], Path(torch.__file__).parent
_SKIPPED = tuple(f"{folder.as_posix()}/" for folder in _LIBRARIES)


def warn_user(message: str, category: type[Warning]) -> None:
    """Warns at the innermost line that lies neither in this package nor in torch.

    Python 3.12 has ``skip_file_prefixes`` for this; modules are called through torch.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_skipped(frame):
        frame = frame.f_back
    if frame is None:  # a thread that torch started
        warnings.warn(message, category, stacklevel=2)
        return
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__", "<string>"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _is_skipped(frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).as_posix().startswith(_SKIPPED)
