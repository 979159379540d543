"""The ops of the CPU back end in torch: schemas, fakes, autograd and saved-tensor hooks."""

import pytest
import torch
from block_scenes import own_calls
from problems import (
    OwnOps,
    answer,
    as_leaves,
    assert_same_answers,
    make_inputs,
    opcheck,
    scene_2d,
)

from vicinal.backends.ops import new_gradients


@pytest.mark.parametrize("features", ["all", "none"])
def test_opcheck(features: str) -> None:
    calls = own_calls()
    assert {"neighborhood_attention", "neighborhood_attention_backward"} <= calls.keys()
    if features == "none":
        plan = scene_2d().plan()
        inputs = make_inputs(plan).fresh()
        with OwnOps() as ops:
            out, _ = inputs.attend(plan, "cpu")
            out.sum().backward()
        calls = ops.calls
    for name, (op, arguments) in calls.items():
        differentiable = not name.endswith("backward")
        opcheck(op, as_leaves(arguments, requires_grad=differentiable))


def test_a_second_derivative_is_refused() -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, background=True).fresh()
    out, _ = inputs.attend(plan, "cpu")
    (grad,) = torch.autograd.grad(out.pow(2).sum(), inputs.q, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grad.sum().backward()


def test_saved_tensors_may_be_moved_elsewhere() -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, background=True, mask=True)
    expected = answer(inputs, plan)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (x.clone(), x.requires_grad), lambda packed: packed[0]
    ):
        assert_same_answers(answer(inputs, plan), expected, 0)


@pytest.mark.parametrize("needs_queries", [False, True])
@pytest.mark.parametrize("needs_points", [False, True])
def test_gradients_that_are_not_needed_have_no_rows(
    needs_queries: bool, needs_points: bool
) -> None:
    q, k, v = torch.empty(5, 2, 4), torch.empty(7, 2, 4), torch.empty(7, 2, 3)
    grads = new_gradients(q, k, v, needs_queries, needs_points)
    needed = needs_queries, needs_points, needs_points
    for grad, x, needs in zip(grads, (q, k, v), needed, strict=True):
        assert grad.shape == (x.shape[0] if needs else 0, *x.shape[1:])
        assert grad.dtype == x.dtype
