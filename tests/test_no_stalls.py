"""A training step never asks what tensors hold, so that a GPU need not be waited for.

Tensors without contents show it: on torch's meta device, whatever asks for them fails.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from vicinal import (
    FeaturePyramid,
    SparseNeighborhoodAttentionBlock,
    backends,
    neighborhood_attention,
    plan_neighborhoods,
)
from vicinal import _constants as constants
from vicinal.kernels import triton

SHAPES = ((24, 24), (12, 12), (6, 6))
SIZES = (3, 5, 3)


@pytest.fixture(autouse=True)
def meta_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    able = backends._BACKENDS["triton"]._replace(problem=lambda device, dtype: None)
    monkeypatch.setitem(backends._BACKENDS, "triton", able)
    monkeypatch.setitem(backends._BY_DEVICE, "meta", "triton")


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that make tensors of numbers, which a GPU must be sent."""
    senders = []
    for name in ("tensor", "as_tensor"):
        plain = getattr(torch, name)

        def spy(*args: Any, plain: Any = plain, **options: Any) -> Tensor:
            frame = __import__("sys")._getframe(1)
            senders.append(frame.f_globals["__name__"])
            made: Tensor = plain(*args, **options)
            return made

        monkeypatch.setattr(torch, name, spy)
    return senders


def make_points(n: int) -> FeaturePyramid:
    coordinates = torch.zeros(n, 4, dtype=torch.int64, device="meta")
    return FeaturePyramid(
        torch.randn(n, 32, device="meta").requires_grad_(), coordinates, SHAPES, 2
    )


@pytest.mark.parametrize("background", [False, True])
def test_a_training_step_with_planning(background: bool, sent: list[str]) -> None:
    with torch.device("meta"):
        block = SparseNeighborhoodAttentionBlock(32, 2, 3, SIZES, dropout=0.1)
        offsets = torch.zeros(3, dtype=torch.int64)
        level, mask = torch.zeros(50, dtype=torch.int64), torch.zeros(50, dtype=torch.bool)
        cells = torch.randn(2, 3, 32).requires_grad_() if background else None
    points = make_points(50)
    sent.clear()
    out = block(points.values, points.positions(), offsets, points, SHAPES, cells, level, mask)
    out.sum().backward()
    assert points.values.grad is not None
    assert all(parameter.grad is not None for parameter in block.parameters())
    # What is sent is kept on the GPU, and sent once.
    assert set(sent) == {constants.__name__}


def test_asking_for_contents_fails() -> None:
    """The check itself: it would notice."""
    with pytest.raises(Exception, match=r"meta"):
        torch.zeros(3, device="meta").sum().item()
    points = make_points(5)
    with pytest.raises(Exception, match=r"meta|Meta"):
        points.batch_offsets()


def test_shapes_follow_from_sizes_alone() -> None:
    """Also with few queries among many points, which are taken one by one."""
    points = make_points(400)
    offsets = torch.zeros(3, dtype=torch.int64, device="meta")
    positions = torch.rand(7, 2, device="meta")
    plan = plan_neighborhoods(positions, offsets, points, SIZES)
    assert plan.query_tiles(triton.find_runs).firsts.shape == (7, 3 + 5 + 3)
    assert plan.point_tiles(triton.find_runs).firsts.shape == (25, 16 * 5)
    q, k = (torch.randn(n, 2, 16, device="meta").requires_grad_() for n in (7, 400))
    out, lse = neighborhood_attention(q, k, k, plan, return_lse=True)
    (out.sum() + lse.sum()).backward()
    assert out.shape == (7, 2, 16)
    assert k.grad is not None
