"""A peer and the library at the same work."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.agreement import ROUNDINGS_OF_SUMS, check_agreement
from benchmarks.outcome import Figures
from benchmarks.work import Work


@dataclass(frozen=True)
class Contest:
    theirs: Work
    ours: Work
    same: bool = True
    """Whether both compute the same thing, which is then checked."""
    no_step: str | None = None
    """Why the peer is not measured in training."""
    apart: Figures = field(default_factory=dict)
    """What the peer did beforehand, and what there is to know of it."""

    def check(self, name: str) -> float:
        """How far apart outputs and inputs' gradients are, in roundings; parameters' as well, but
        these are not counted.

        Raises:
            DisagreementError: farther than they may be.
        """
        apart = check_agreement(f"{name}, output", self.theirs.forward(), self.ours.forward())
        if self.no_step is None:
            # Drawn at random: the gradients of a plain sum cancel in many places.
            theirs, ours = self.theirs.step(_drawn), self.ours.step(_drawn)
            n = len(self.ours.inputs)
            apart = max(apart, check_agreement(f"{name}, gradient", theirs[:n], ours[:n]))
            of_weights = f"{name}, gradient of a parameter"
            check_agreement(of_weights, theirs[n:], ours[n:], ROUNDINGS_OF_SUMS)
        return apart


def step_problem(work: Work) -> str | None:
    """Why there is no training step, from trying one; for peers that may know only the forward."""
    try:
        work.step()
    except NotImplementedError as error:
        return str(error).split(".")[0].strip()
    return None


def _drawn(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
