"""Transforms of torch: what the compiled kernels cannot do is refused, never zero."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import make_inputs, scene_2d
from torch import Tensor
from torch.autograd import forward_ad

from vicinal.backends import choose_backend
from vicinal.backends.cpu import projection_ops

# Torch itself scripts its formulas of forward mode when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


PLAN = scene_2d().plan()
INPUTS = make_inputs(PLAN)


def attend(q: Tensor) -> Tensor:
    return INPUTS._replace(q=q).attend(PLAN, "cpu")[0]


def rotate(x: Tensor) -> Tensor:
    cpu = choose_backend("cpu", torch.device("cpu"))
    return cpu.rotate(x, torch.ones(12, 3), torch.ones(3, 2, 2))


def project(x: Tensor) -> Tensor:
    return projection_ops.project(x.flatten(1), [torch.ones(3, 8).to(x)], [], [], 0.0, None)[0]


def by_dual(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


@pytest.mark.parametrize("function", [attend, rotate, project])
@pytest.mark.parametrize(
    "transform", [by_dual, lambda f, x: torch.func.jvp(f, (x,), (x,)),
                  lambda f, x: torch.func.jacfwd(f)(x)],
)  # fmt: skip
def test_forward_mode_is_refused(function: Callable[[Tensor], Tensor], transform: Any) -> None:
    x = torch.randn(12, 2, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        transform(function, x)
