"""A computation as calls that can be timed: its forward, its backward, a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import Call

Compute = Callable[..., Tensor | tuple[Tensor, ...]]
Cotangent = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Work:
    """``compute(*inputs)``, and the ``parameters`` that its backward pass reaches beside them."""

    compute: Compute
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, ...]:
        return _as_tuple(self.compute(*self.inputs))

    def step(self, cotangent: Cotangent = torch.ones_like) -> tuple[Tensor | None, ...]:
        """A training step: forward, and backward to inputs and parameters.

        ``cotangent`` of an output is what its gradient starts from. Returns the gradients, None
        where there is none.
        """
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        parts = _as_tuple(self.compute(*leaves))
        starts = [cotangent(part) for part in parts]
        return torch.autograd.grad(parts, [*leaves, *self.parameters], starts, allow_unused=True)

    def backward(self) -> Call:
        """The backward pass to the inputs as a call; the forward is run here, once."""
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        parts = _as_tuple(self.compute(*leaves))
        ones = [torch.ones_like(part) for part in parts]
        return lambda: torch.autograd.grad(parts, leaves, ones, retain_graph=True)


def _as_tuple(parts: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return parts if isinstance(parts, tuple) else (parts,)
