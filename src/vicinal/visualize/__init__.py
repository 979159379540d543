"""Visualization of attention weights: matplotlib figures and interactive HTML pages.

The figures need matplotlib, ``pip install 'vicinal[visualize]'``. The pages need no extra package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .explorer import View, write_explorer
from .record import AttentionRecord

if TYPE_CHECKING:
    from .figures import draw_attention
    from .overview import draw_overview

__all__ = ["AttentionRecord", "View", "draw_attention", "draw_overview", "write_explorer"]

_FIGURES = {"draw_attention": ".figures", "draw_overview": ".overview"}


def __getattr__(name: str) -> Any:
    """Imports what needs matplotlib on first access."""
    if name not in _FIGURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_FIGURES[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        message = f"{name} needs matplotlib: pip install 'vicinal[visualize]'"
        raise ImportError(message) from error
