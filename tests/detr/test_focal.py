"""Focal and varifocal loss against their formulas."""

from collections.abc import Callable

import pytest
import torch
from detr_scenes import plain_focal, plain_varifocal, refused
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_close
from torch import Tensor

from vicinal.detr import sigmoid_focal_loss, varifocal_loss


@given(
    st.lists(
        st.tuples(st.lists(st.floats(-15, 15), min_size=3, max_size=3), st.integers(-1, 2)),
        min_size=1,
        max_size=5,
    ),
    st.floats(0, 1),
    st.floats(0, 5),
)
def test_focal_loss_matches_its_formula(
    rows: list[tuple[list[float], int]], alpha: float, gamma: float
) -> None:
    logits = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    labels = torch.tensor([label for _, label in rows])
    expected = [
        sum(plain_focal(logit, column == label, alpha, gamma) for column, logit in enumerate(row))
        for row, label in rows
    ]
    loss = sigmoid_focal_loss(logits, labels, alpha, gamma)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_focal_loss_with_gamma_0_is_cross_entropy() -> None:
    logits, labels = torch.randn(20, 4, dtype=torch.float64), torch.randint(-1, 4, (20,))
    classes = torch.nn.functional.one_hot(labels + 1, 5)[:, 1:].double()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, classes, reduction="none"
    )
    assert_close(2 * sigmoid_focal_loss(logits, labels, 0.5, 0), entropy.sum(1), 1e-14)


def test_varifocal_loss_matches_its_formula() -> None:
    logits, labels = torch.randn(20, 3, dtype=torch.float64), torch.randint(-1, 3, (20,))
    quality = torch.rand(20, dtype=torch.float64)
    expected = [
        sum(
            plain_varifocal(logit, score) if column == label else plain_focal(logit, False, 0.3, 2)
            for column, logit in enumerate(row)
        )
        for row, label, score in zip(
            logits.tolist(), labels.tolist(), quality.tolist(), strict=True
        )
    ]
    loss = varifocal_loss(logits, labels, quality, 0.3, 2.0)
    assert_close(loss, torch.tensor(expected, dtype=torch.float64), 1e-14)


def test_varifocal_loss_has_no_gradient_where_scores_equal_quality() -> None:
    quality = torch.rand(5, dtype=torch.float64)
    logits = torch.logit(quality)[:, None].requires_grad_()
    varifocal_loss(logits, torch.zeros(5).long(), quality).sum().backward()
    assert logits.grad is not None
    assert_close(logits.grad, torch.zeros_like(logits), 1e-15)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients_of_the_losses_of_logits(gamma: float) -> None:
    logits = (3 * torch.randn(6, 3, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([-1, 0, 1, 2, -1, 1])
    quality = torch.rand(6, dtype=torch.float64)
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda x: sigmoid_focal_loss(x, labels, 0.25, gamma),
        lambda x: varifocal_loss(x, labels, quality, 0.25, gamma),
    ]
    for loss in losses:
        assert torch.autograd.gradcheck(loss, (logits,))
        assert torch.autograd.gradgradcheck(loss, (logits,))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_have_finite_losses_and_gradients(gamma: float, dtype: torch.dtype) -> None:
    row = [-1e30, -1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, 1e30]
    logits = torch.tensor(row, dtype=dtype)[:, None].repeat(2, 1).requires_grad_()
    labels = torch.tensor([0] * 9 + [-1] * 9)
    for loss in (
        sigmoid_focal_loss(logits, labels, 0.25, gamma),
        varifocal_loss(logits, labels, torch.full((18,), 0.5), 0.25, gamma),
    ):
        assert loss.dtype == torch.float32
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize(
    ("logits", "labels", "argument", "came"),
    [
        (torch.rand(4), torch.zeros(4).long(), "logits", "[4]"),
        (torch.zeros(4, 3).long(), torch.zeros(4).long(), "logits", "int64"),
        (torch.rand(4, 3), torch.zeros(3).long(), "labels", "[3]"),
        (torch.rand(4, 3), torch.zeros(4), "labels", "float32"),
        (torch.rand(4, 3), torch.tensor([0, 1, -1, 3]), "labels", "from -1 to 3"),
        (torch.rand(4, 3), torch.tensor([0, 1, -2, 2]), "labels", "from -2 to 2"),
    ],
)
def test_refused_logits_and_labels(
    logits: Tensor, labels: Tensor, argument: str, came: str
) -> None:
    with refused(argument, came):
        sigmoid_focal_loss(logits, labels)


def test_refused_quality() -> None:
    with refused("quality", "[4, 3]"):
        varifocal_loss(torch.rand(4, 3), torch.zeros(4).long(), torch.rand(4, 3))
