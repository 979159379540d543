"""`neighborhood_attention` on both back ends: against the oracle and against each other."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    Inputs,
    Scene,
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
    scenes,
)
from torch import Tensor, nn

from vicinal import (
    FeaturePyramid,
    neighborhood_attention,
    neighborhood_attention_weights,
    plan_neighborhoods,
)
from vicinal._utils.types import BackendName

EXACT = 1e-11


# ------------------------------------------------------------------------------- against the oracle


@given(
    scene=scenes(),
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 2, 4, 6]),
    value_width=st.sampled_from([1, 3, 4]),
    background=st.booleans(),
    mask=st.booleans(),
    scale=st.sampled_from([None, 0.3, 0.0, -1.5]),
)
@settings(max_examples=40)
def test_output_and_gradients_match_the_oracle(
    backend: BackendName,
    scene: Scene,
    heads: int,
    width: int,
    value_width: int,
    background: bool,
    mask: bool,
    scale: float | None,
) -> None:
    plan = scene.plan()
    inputs = make_inputs(
        plan, heads=heads, width=width, value_width=value_width, background=background, mask=mask
    )
    expected = differentiate(inputs, lambda leaves: oracle(scene, leaves, scale))
    actual = differentiate(inputs, lambda leaves: leaves.attend(plan, backend, scale=scale))
    assert_same_answers(actual, expected, EXACT)


WIDTHS = [(1, 1), (2, 3), (4, 1), (5, 2), (6, 6), (7, 9), (8, 5), (10, 7), (16, 16), (24, 24),
          (32, 32), (34, 33), (64, 17), (96, 40), (128, 128), (130, 3), (256, 31),
          (2, 256)]  # fmt: skip


@pytest.mark.parametrize(("width", "value_width"), WIDTHS)
@pytest.mark.parametrize("background", [False, True])
def test_head_dims(width: int, value_width: int, background: bool) -> None:
    scene = scene_2d()
    plan = scene.plan()
    inputs = make_inputs(plan, width=width, value_width=value_width, background=background)
    expected = differentiate(inputs, lambda leaves: oracle(scene, leaves))
    assert_same_answers(answer(inputs, plan, "cpu"), expected, EXACT)
    single = answer(inputs.map(Tensor.float), plan, "cpu")
    assert_close(single.out.double(), expected.out, 1e-5)
    for index, (left, right) in enumerate(zip(single.grads, expected.grads, strict=True)):
        assert_close(left.double(), right, 3e-5, f"gradient {index}")


def test_default_scale_is_one_over_sqrt_of_head_dim(backend: BackendName) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, width=6)
    default = inputs.attend(plan, backend)[0]
    assert_close(inputs.attend(plan, backend, scale=1 / math.sqrt(6))[0], default, 1e-14)
    assert not torch.allclose(inputs.attend(plan, backend, scale=1.0)[0], default, atol=1e-3)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_backends_agree(background: bool, mask: bool, dropout_p: float) -> None:
    plan = crowded_scene().plan()
    inputs = make_inputs(plan, heads=4, width=10, value_width=7, background=background, mask=mask)
    first = answer(inputs, plan, "cpu", dropout_p=dropout_p)
    second = answer(inputs, plan, "reference", dropout_p=dropout_p)
    assert_same_answers(first, second, EXACT)
    assert all(grad.any() for grad in first.grads)


@given(scene=scenes(max_dim=4), background=st.booleans(), dropout_p=st.sampled_from([0.0, 0.5]))
def test_backends_agree_on_random_problems(
    scene: Scene, background: bool, dropout_p: float
) -> None:
    plan = scene.plan()
    inputs = make_inputs(plan, width=6, value_width=3, background=background, mask=True)
    first = answer(inputs, plan, "cpu", dropout_p=dropout_p)
    assert_same_answers(first, answer(inputs, plan, "reference", dropout_p=dropout_p), EXACT)


def test_extreme_logits(backend: BackendName) -> None:
    # Logits beyond the range of exp, of both signs, and of very different size per head.
    scene = scene_2d(n_queries=30)
    plan = scene.plan()
    inputs = make_inputs(plan, width=8, background=True)
    inputs = inputs._replace(q=inputs.q * torch.tensor([300.0, 1e-9])[:, None])
    expected = differentiate(inputs, lambda leaves: oracle(scene, leaves))
    assert expected.lse.abs()[expected.lse.isfinite()].max() > 700
    actual = answer(inputs, plan, backend)
    assert_close(actual.out, expected.out, 1e-9)
    assert_close(actual.lse, expected.lse, 1e-9)
    for left, right in zip(actual.grads, expected.grads, strict=True):
        assert_close(left / 300, right / 300, 1e-9)


def test_hundreds_of_neighbors(backend: BackendName) -> None:
    # More neighbors than any kernel processes in one block.
    scene = full_window_scene(5, 700)
    plan = scene.plan()
    inputs = make_inputs(plan)
    expected = differentiate(inputs, lambda leaves: oracle(scene, leaves))
    assert_same_answers(answer(inputs, plan, backend), expected, EXACT)


def test_images_do_not_attend_to_each_other(backend: BackendName) -> None:
    scene = make_scene(((5, 5),), (17,), (6, 0, 6), 60)
    plan = scene.plan()
    inputs = make_inputs(plan)
    first = scene.pyramid.batch == 0
    changed = inputs._replace(v=torch.where(first[:, None, None], 1e6, inputs.v))
    before, after = inputs.attend(plan, backend)[0], changed.attend(plan, backend)[0]
    assert torch.equal(before[6:], after[6:])
    assert (before[:6] != after[:6]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, backend: BackendName) -> None:
    scene = scene_2d()
    plan = scene.plan()
    inputs = make_inputs(plan, background=True, dtype=dtype)
    out, lse = inputs.attend(plan, backend)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grads = answer(inputs, plan, backend).grads
    assert {grad.dtype for grad in grads} == {dtype}
    expected, _ = oracle(scene, inputs.map(Tensor.double))
    assert_close(out.double(), expected, 4 * torch.finfo(dtype).eps)


def test_output_is_the_same_without_return_lse(backend: BackendName) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan)
    out = neighborhood_attention(*inputs[:3], plan, backend=backend)
    assert torch.equal(out, inputs.attend(plan, backend)[0])


@pytest.mark.parametrize("of_out", [False, True])
def test_gradients_of_one_result_add_nothing_for_the_other(
    of_out: bool, backend: BackendName
) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, background=True)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out, lse = inputs._replace(q=leaves[0], k=leaves[1], v=leaves[2]).attend(plan, backend)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    used, other = (out, finite) if of_out else (finite, out)
    alone = torch.autograd.grad(used.sin().sum(), leaves, retain_graph=True, materialize_grads=True)
    both = torch.autograd.grad(used.sin().sum() + 0 * other.sum(), leaves)
    for actual, expected in zip(alone, both, strict=True):
        assert_close(actual, expected, 1e-13)
    assert alone[0].any()


def test_default_backend_is_cpu() -> None:
    plan = crowded_scene().plan()
    inputs = make_inputs(plan, width=32, dtype=torch.float32)
    default = neighborhood_attention(*inputs[:3], plan)
    assert torch.equal(default, inputs.attend(plan, "cpu")[0])
    assert not torch.equal(default, inputs.attend(plan, "reference")[0]), (
        "the reference rounds differently"
    )


def test_lse_combines_attention_over_two_sets_of_points(backend: BackendName) -> None:
    # Attention over two sets of points is the mean of both, weighted by exp(lse).
    scene = full_window_scene(6, 40)
    inputs = make_inputs(scene.plan())
    whole, whole_lse = inputs.attend(scene.plan(), backend)
    halves = []
    for half in (slice(0, 15), slice(15, 40)):
        pyramid = type(scene.pyramid)(
            scene.pyramid.values[half], scene.pyramid.coordinates[half], ((5, 5),), 1
        )
        plan = Scene(scene.positions, scene.offsets, pyramid, scene.sizes).plan()
        halves.append(Inputs(inputs.q, inputs.k[half], inputs.v[half]).attend(plan, backend))
    (left, left_lse), (right, right_lse) = halves
    assert_close(torch.logaddexp(left_lse, right_lse), whole_lse, 1e-12)
    share = (left_lse - whole_lse).exp()[..., None]
    assert_close(share * left + (1 - share) * right, whole, 1e-12)


# -------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("background", [False, True])
def test_masked_queries_output_zero(background: bool, backend: BackendName) -> None:
    plan = crowded_scene().plan()
    inputs = make_inputs(plan, background=background, mask=True)
    mask = inputs.query_mask
    assert mask is not None
    result = answer(inputs, plan, backend)
    unmasked = answer(inputs._replace(query_mask=None), plan, backend)
    assert not result.out[mask].any()
    assert (result.lse[mask] == -torch.inf).all()
    assert_close(result.lse[~mask], unmasked.lse[~mask], 1e-13)
    assert_close(result.out[~mask], unmasked.out[~mask], 1e-13)
    assert not result.grads[0][mask].any()
    assert result.grads[0][~mask].any()
    if background:
        assert not result.grads[3][mask].any()


@pytest.mark.parametrize("background", [False, True])
def test_all_queries_masked(background: bool, backend: BackendName) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, background=background)
    inputs = inputs._replace(query_mask=torch.ones(plan.n_queries, dtype=torch.bool))
    result = answer(inputs, plan, backend)
    assert not result.out.any()
    assert not any(grad.any() for grad in result.grads)


def test_nan_gradient_of_a_masked_query_does_not_spread(backend: BackendName) -> None:
    plan = crowded_scene().plan()
    inputs = make_inputs(plan, background=True, mask=True).fresh()
    assert inputs.query_mask is not None
    out, _ = inputs.attend(plan, backend)
    cotangent = torch.ones_like(out).masked_fill(inputs.query_mask[:, None, None], torch.nan)
    assert inputs.background is not None
    for grad in torch.autograd.grad(out, (*inputs.background, inputs.k, inputs.v), cotangent):
        assert grad.isfinite().all()


def test_nan_in_a_masked_query_has_no_effect(backend: BackendName) -> None:
    plan = crowded_scene().plan()
    inputs = make_inputs(plan, background=True, mask=True)
    assert inputs.query_mask is not None
    assert inputs.background is not None
    masked = inputs.query_mask
    with_nan = inputs._replace(
        q=inputs.q.masked_fill(masked[:, None, None], torch.nan),
        background=inputs.background._replace(
            query=inputs.background.query.masked_fill(masked[:, None, None, None], torch.nan)
        ),
    )
    before, after = answer(inputs, plan, backend), answer(with_nan, plan, backend)
    assert_same_answers(after, before, 1e-13)


# ----------------------------------------------------------------------------------- memory layouts


def rearranged(x: Tensor, layout: str) -> Tensor:
    """``x`` ``[n, H, d]`` with the same values and other strides."""
    if layout == "fused projection":
        return torch.stack((x * 2, x), 1)[:, 1]
    if layout == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels first":
        return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if layout == "every other row":
        return x.repeat_interleave(2, 0)[::2]
    if layout == "every other channel":
        return x.repeat_interleave(2, 2)[..., ::2]
    return torch.nn.functional.pad(x, (3, 2, 1, 0, 0, 4))[: len(x), 1:, 3:-2]


LAYOUTS = ["fused projection", "heads first", "channels first", "every other row",
           "every other channel", "slice of a larger tensor"]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 6])
def test_noncontiguous_inputs(layout: str, width: int, backend: BackendName) -> None:
    plan = crowded_scene(50, 80).plan()
    inputs = make_inputs(plan, heads=3, width=width, value_width=width)

    def attend(leaves: Inputs) -> tuple[Tensor, Tensor]:
        views = leaves.map(lambda x: rearranged(x, layout))
        assert width == 1 or not views.k.is_contiguous()
        return views.attend(plan, backend)

    assert_same_answers(differentiate(inputs, attend), answer(inputs, plan, backend), 1e-13)


def test_expanded_inputs_and_gradients(backend: BackendName) -> None:
    # `expand` gives strides of zero, and `sum` has an expanded gradient.
    scene = full_window_scene(9, 20)
    plan = scene.plan()
    inputs = make_inputs(plan, background=True)
    row = inputs.map(lambda x: x[:1]).fresh()
    rows = row.leaves()
    views = inputs.with_leaves(
        [x.expand(y.shape) for x, y in zip(rows, inputs.leaves(), strict=True)]
    )
    out, lse = views.attend(plan, backend)
    expected_out, expected_lse = oracle(scene, views)
    actual = torch.autograd.grad(out.sum() + lse.sum(), rows)
    expected = torch.autograd.grad(expected_out.sum() + expected_lse.sum(), rows)
    assert_close(out, expected_out, 1e-13)
    for left, right in zip(actual, expected, strict=True):
        assert_close(left, right, EXACT)


def test_noncontiguous_mask(backend: BackendName) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, mask=True)
    assert inputs.query_mask is not None
    strided = inputs._replace(query_mask=inputs.query_mask.repeat_interleave(2)[::2])
    assert torch.equal(strided.attend(plan, backend)[0], inputs.attend(plan, backend)[0])


# ----------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_inputs(dtype: torch.dtype, backend: BackendName) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, background=True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out, _ = inputs.attend(plan, backend)
    assert out.dtype == dtype
    assert torch.equal(out, inputs.map(lambda x: x.to(dtype)).attend(plan, backend)[0])


def test_autocast_does_not_cast_float64(backend: BackendName) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = inputs.attend(plan, backend)
    assert torch.equal(out, inputs.attend(plan, backend)[0])


# -------------------------------------------------------------------------------- large coordinates


@pytest.mark.parametrize("center", [2**31, 2**32])
def test_columns_beyond_32_bits(center: int, backend: BackendName) -> None:
    # Empty cells of a window are found from the last coordinates of points and centers.
    columns = torch.tensor([center - 3, center - 1, center, center + 2])
    zeros = torch.zeros_like(columns)
    pyramid = FeaturePyramid(
        torch.zeros(4, 1), torch.stack((zeros, columns, zeros), 1), ((2**32 + 10,),), 1
    )
    positions = torch.tensor([[center + 0.5], [center - 0.5]], dtype=torch.float64)
    scene = Scene(positions, torch.tensor([0, 2]), pyramid, (7,))
    plan = scene.plan()
    inputs = make_inputs(plan, background=True)
    assert_close(inputs.attend(plan, backend)[0], oracle(scene, inputs)[0], 1e-13)


def test_numpy_arrays_serve_as_tensors() -> None:
    scene = scene_2d()
    plan = scene.plan()
    q = torch.randn(plan.n_queries, 2, 4)
    k, v = torch.randn(2, plan.n_points, 2, 4)
    mask = torch.rand(plan.n_queries) < 0.5
    expected = neighborhood_attention(q, k, v, plan, query_mask=mask)
    arrays: Any = [x.numpy() for x in (q, k, v, mask)]
    out = neighborhood_attention(
        arrays[0], arrays[1], arrays[2], plan, query_mask=arrays[3], return_lse=False
    )
    assert torch.equal(out, expected)
    where: list[Any] = [scene.positions.numpy(), scene.offsets.numpy(), np.array(scene.sizes)]
    from_arrays = plan_neighborhoods(where[0], where[1], scene.pyramid, where[2])
    assert torch.equal(from_arrays.pairs(), plan.pairs())


@pytest.mark.parametrize("scale", [nn.Parameter(torch.tensor(0.5)), torch.ones(2), "x"])
def test_a_scale_is_a_number(scale: Any) -> None:
    """A tensor would get no gradient."""
    pyramid = FeaturePyramid(torch.ones(1, 2), torch.tensor([[0, 1, 1, 0]]), ((4, 4),), 1)
    plan = plan_neighborhoods(pyramid.positions(), pyramid.batch_offsets(), pyramid, [3])
    x = torch.ones(1, 1, 2)
    with pytest.raises(ValueError, match="scale: expected a number"):
        neighborhood_attention(x, x, x, plan, scale=scale)
    with pytest.raises(ValueError, match="scale: expected a number"):
        neighborhood_attention_weights(x, x, plan, scale=scale)
