"""What becomes of a measurement: figures, or a plain word why there are none."""

from __future__ import annotations

from dataclasses import dataclass, field

Figures = dict[str, float | str]

OUT_OF_MEMORY = "out of memory"
KILLED = "killed, most likely for the memory it took"


class Unable(Exception):  # noqa: N818 - not an error: the study says so and goes on
    """Something that cannot run here; the message says why in plain words."""


class DisagreementError(AssertionError):
    """Two ways to compute the same thing that differ: nothing may be measured."""


@dataclass(frozen=True)
class Outcome:
    """Of one case, run in a process of its own."""

    figures: Figures = field(default_factory=dict)
    problem: str | None = None
    """Why there are no figures."""

    @property
    def lacked_memory(self) -> bool:
        return self.problem in (OUT_OF_MEMORY, KILLED)

    def number(self, name: str) -> float:
        return float(self.figures[name])

    def find(self, name: str) -> float | None:
        """The number of that name, or None where there is none."""
        return self.number(name) if name in self.figures else None
