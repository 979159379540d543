"""Tests of the reference alone: second derivatives, and results that do not depend on chunks."""

import pytest
import torch
from problems import (
    answer,
    assert_close,
    assert_same_answers,
    crowded_scene,
    make_inputs,
    make_scene,
)
from torch import Tensor

from vicinal.backends import reference


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradgradcheck(background: bool, dropout_p: float) -> None:
    plan = make_scene(((3,), (2,)), (5, 3), (2, 0, 1), 8).plan()
    assert plan.counts().sum() > 4
    inputs = make_inputs(plan, heads=1, width=2, value_width=1, background=background).fresh()

    def attend(*leaves: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        out, lse = inputs.with_leaves(leaves).attend(plan, "reference", dropout_p=dropout_p)
        return out, torch.where(lse.isfinite(), lse, 0)

    assert torch.autograd.gradgradcheck(attend, inputs.leaves())


@pytest.mark.parametrize("chunk", [1, 7, 150])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_chunks_make_no_difference(
    chunk: int, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = crowded_scene(40, 80).plan()
    inputs = make_inputs(plan, background=True, mask=True)

    whole = answer(inputs, plan, "reference", dropout_p=dropout_p)
    monkeypatch.setattr(reference, "CHUNK", chunk)
    chunked = answer(inputs, plan, "reference", dropout_p=dropout_p)
    assert_same_answers(chunked, whole, 1e-13)


def test_a_drawn_mask_is_the_same_in_any_order() -> None:
    # Whether a weight is kept is a hash of its indices alone.
    generator = torch.Generator().manual_seed(0)
    seed = torch.tensor(2**61 + 12345)
    query = torch.randint(1000, (500,), generator=generator)
    column = torch.randint(1000, (500,), generator=generator)
    order = torch.randperm(500, generator=generator)
    kept = reference.keep_mask(seed, query, column, 3, 0.5)
    assert torch.equal(reference.keep_mask(seed, query[order], column[order], 3, 0.5), kept[order])
    assert torch.equal(reference.keep_mask(seed, query, column, 2, 0.5), kept[:, :2])
    # A higher rate drops what the lower one drops, and more.
    fewer = reference.keep_mask(seed, query, column, 3, 0.8)
    assert not (fewer & ~kept).any()
    # Both halves of the seed count.
    for other in (seed + 1, seed + 2**40):
        share = (reference.keep_mask(other, query, column, 3, 0.5) == kept).double().mean()
        assert_close(share, torch.tensor(0.5, dtype=torch.float64), 0.06)


def test_no_queries_and_no_chunks() -> None:
    plan = make_scene(((4,),), (3,), (0, 0), 6).plan()
    result = answer(make_inputs(plan), plan, "reference")
    assert result.out.shape == (0, 2, 4)
    assert result.lse.shape == (0, 2)
    assert [grad.shape for grad in result.grads] == [(0, 2, 4), (6, 2, 4), (6, 2, 4)]
    assert not any(grad.any() for grad in result.grads)
