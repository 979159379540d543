"""Gradients of attention, determinism over threads, and use of uninitialized memory."""

from typing import Any

import pytest
import torch
from problems import (
    Inputs,
    answer,
    assert_close,
    assert_same_answers,
    crowded_scene,
    differentiate,
    full_window_scene,
    make_inputs,
    make_scene,
    oracle,
    scene_2d,
    wide_scene,
)
from torch import Tensor

from vicinal import NeighborhoodPlan
from vicinal._utils.types import BackendName

EXACT = 1e-11

# ---------------------------------------------------------------------------------------- gradients


def tiny_plan() -> NeighborhoodPlan:
    plan = make_scene(((5,), (3,)), (5, 3), (3, 0, 2), 9).plan()
    assert plan.counts().sum() > 5
    return plan


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradcheck(background: bool, dropout_p: float, backend: BackendName) -> None:
    plan = tiny_plan()
    inputs = make_inputs(plan, width=2, value_width=1, background=background, mask=True).fresh()

    def attend(*leaves: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        out, lse = inputs.with_leaves(leaves).attend(plan, backend, dropout_p=dropout_p)
        return out, torch.where(lse.isfinite(), lse, 0)

    fast = backend == "reference"  # slow, and made of differentiable torch operations only
    assert torch.autograd.gradcheck(attend, inputs.leaves(), fast_mode=fast)


@pytest.mark.parametrize("needed", range(6))
def test_gradient_of_a_single_input(needed: int, backend: BackendName) -> None:
    plan = tiny_plan()
    inputs = make_inputs(plan, background=True)
    expected = answer(inputs, plan, "reference").grads[needed]
    leaves = [leaf.detach() for leaf in inputs.leaves()]
    leaves[needed].requires_grad_()
    actual = differentiate_one(inputs.with_leaves(leaves), plan, backend, leaves[needed])
    assert_close(actual, expected, EXACT)


def differentiate_one(
    inputs: Inputs, plan: NeighborhoodPlan, backend: BackendName, leaf: Tensor
) -> Tensor:
    """The gradient of ``leaf`` under the cotangents of `differentiate`."""
    generator = torch.Generator().manual_seed(11)
    out, lse = inputs.attend(plan, backend)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (out, lse)]
    lse = torch.where(lse.isfinite(), lse, 0)
    (grad,) = torch.autograd.grad((out * weights[0]).sum() + (lse * weights[1]).sum(), leaf)
    return grad


@pytest.mark.parametrize("which", ["out", "lse"])
def test_gradients_of_a_single_output(which: str, backend: BackendName) -> None:
    scene = full_window_scene(9, 20)
    plan = scene.plan()
    index = ["out", "lse"].index(which)

    def grads(attend: Any) -> tuple[Tensor, ...]:
        inputs = make_inputs(plan).fresh()
        weights = torch.arange(9.0)[:, None]
        result = attend(inputs)[index]
        result = result.sum(-1) if which == "out" else result
        (result * weights).sum().backward()
        return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs.leaves())

    expected = grads(lambda leaves: oracle(scene, leaves))
    actual = grads(lambda leaves: leaves.attend(plan, backend))
    for left, right in zip(actual, expected, strict=True):
        assert_close(left, right, EXACT)


def test_plan_and_inputs_are_not_modified(backend: BackendName) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, background=True, mask=True).fresh()
    copies = [leaf.detach().clone() for leaf in inputs.leaves()]
    pairs = plan.pairs()
    answer(inputs, plan, backend, dropout_p=0.5)
    assert torch.equal(plan.pairs(), pairs)
    for leaf, copy in zip(inputs.leaves(), copies, strict=True):
        assert torch.equal(leaf, copy)


# -------------------------------------------------------------------------------------- determinism


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_results_are_bitwise_equal_for_any_number_of_threads(
    background: bool, dropout_p: float, backend: BackendName
) -> None:
    # Thousands of queries make many chunks of work; float32 shows any change of summation order.
    plan = (wide_scene() if backend == "cpu" else crowded_scene()).plan()
    inputs = make_inputs(plan, width=8, background=background, dtype=torch.float32)
    results = []
    for threads in (1, 2, 2, 3, 4) if backend == "cpu" else (1, 2, 2):
        torch.set_num_threads(threads)
        result = answer(inputs, plan, backend, dropout_p=dropout_p)
        results.append([result.out, result.lse, *result.grads])
    for other in results[1:]:
        for index, (left, right) in enumerate(zip(results[0], other, strict=True)):
            assert torch.equal(left, right), index


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("background", [False, True])
def test_backends_agree_on_thousands_of_queries(background: bool) -> None:
    torch.set_num_threads(2)
    plan = wide_scene().plan()
    inputs = make_inputs(plan, width=6, value_width=3, background=background, mask=True)
    first = answer(inputs, plan, "cpu", dropout_p=0.2)
    assert_same_answers(first, answer(inputs, plan, "reference", dropout_p=0.2), EXACT)


@pytest.mark.usefixtures("restored_threads")
def test_plan_is_equal_for_any_number_of_threads() -> None:
    scene = crowded_scene(3000, 3000)
    torch.set_num_threads(1)
    first = scene.plan()
    torch.set_num_threads(3)
    second = scene.plan()
    for left, right in (
        (first._tensors.query_slices, second._tensors.query_slices),
        (first._point_slices(), second._point_slices()),
    ):
        assert all(map(torch.equal, left, right))


@pytest.mark.usefixtures("uninitialized_is_nan")
@pytest.mark.parametrize("background", [False, True])
def test_uninitialized_memory_is_not_read_or_returned(
    background: bool, backend: BackendName
) -> None:
    scene = scene_2d(n_queries=40, n_points=50)
    scene.positions[5] = 1e9
    plan = scene.plan()
    assert sorted(map(tuple, plan.pairs().tolist())) == sorted(scene.pairs())
    inputs = make_inputs(plan, width=6, value_width=5, background=background, mask=True)
    expected = differentiate(inputs, lambda leaves: oracle(scene, leaves))
    assert_same_answers(answer(inputs, plan, backend), expected, EXACT)
    halves = inputs.map(Tensor.bfloat16)
    dropped = answer(halves, plan, backend, dropout_p=0.3)
    assert all(x.isfinite().all() for x in (dropped.out, *dropped.grads))
