"""Cases run once more in a process that keeps the memory it frees.

Else a large result goes back to the system when freed, and the next is fresh memory again: the
system clears its pages, and a virtual machine may first have to ask its host for them. That time
depends on the machine and on how long pages lay idle, and none of it is the library's.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from benchmarks.outcome import Figures, Unable

KEEPING = "keeping/"
"""What the names of such cases begin with."""

SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Of the GNU C library, to be read when the process starts."""


def keeping(case: Callable[[], Figures]) -> Callable[[], Figures]:
    """The case, refused in a process without the settings or with another C library.

    Raises:
        Unable: when called there.
    """

    def run() -> Figures:
        if not _is_gnu():
            raise Unable("only the GNU C library knows how to keep what is freed")
        if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
            wanted = " ".join(f"{name}={value}" for name, value in SETTINGS.items())
            raise Unable(f"needs {wanted} in the environment")
        return case()

    return run


def _is_gnu() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (AttributeError, ValueError):
        return False
