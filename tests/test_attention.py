"""The functional op on both back ends: against the oracle, against each other, and refusals."""

import math
from typing import Any

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
    make_inputs,
    make_scene,
    one_room,
    oracle,
    scene_2d,
    scenes,
    wide_scene,
)
from torch import Tensor

from vicinal import (
    Background,
    FeaturePyramid,
    NeighborhoodPlan,
    neighborhood_attention,
    neighborhood_attention_weights,
)

EXACT = 1e-11


# ------------------------------------------------------------------------------- the oracle


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
def test_random_problems_against_the_oracle(
    backend: str,
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
def test_widths_of_heads(width: int, value_width: int, background: bool) -> None:
    scene = scene_2d()
    plan = scene.plan()
    inputs = make_inputs(plan, width=width, value_width=value_width, background=background)
    expected = differentiate(inputs, lambda leaves: oracle(scene, leaves))
    assert_same_answers(answer(inputs, plan, "cpu"), expected, EXACT)
    single = answer(inputs.map(Tensor.float), plan, "cpu")
    assert_close(single.out.double(), expected.out, 1e-5)
    for index, (left, right) in enumerate(zip(single.grads, expected.grads, strict=True)):
        assert_close(left.double(), right, 3e-5, f"gradient {index}")


def test_the_scale_is_that_of_the_width_unless_given(backend: str) -> None:
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


def test_extreme_logits(backend: str) -> None:
    # Far beyond what exp can hold, in both directions, and of different size from head to head.
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


def test_hundreds_of_neighbors(backend: str) -> None:
    # More than any kernel holds at a time.
    scene = one_room(5, 700)
    plan = scene.plan()
    inputs = make_inputs(plan)
    expected = differentiate(inputs, lambda leaves: oracle(scene, leaves))
    assert_same_answers(answer(inputs, plan, backend), expected, EXACT)


def test_one_image_does_not_see_another(backend: str) -> None:
    scene = make_scene(((5, 5),), (17,), (6, 0, 6), 60)
    plan = scene.plan()
    inputs = make_inputs(plan)
    first = scene.pyramid.batch == 0
    changed = inputs._replace(v=torch.where(first[:, None, None], 1e6, inputs.v))
    before, after = inputs.attend(plan, backend)[0], changed.attend(plan, backend)[0]
    assert torch.equal(before[6:], after[6:])
    assert (before[:6] != after[:6]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
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


def test_without_the_log_sum_exp(backend: str) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan)
    out = neighborhood_attention(*inputs[:3], plan, backend=backend)
    assert torch.equal(out, inputs.attend(plan, backend)[0])


def test_the_backend_is_the_kernel_by_default() -> None:
    plan = crowded_scene().plan()
    inputs = make_inputs(plan, width=32, dtype=torch.float32)
    default = neighborhood_attention(*inputs[:3], plan)
    assert torch.equal(default, inputs.attend(plan, "cpu")[0])
    assert not torch.equal(default, inputs.attend(plan, "reference")[0]), "they round differently"


def test_the_log_sum_exp_joins_two_halves(backend: str) -> None:
    # What it is for: attention over two sets of points is their mean weighted by exp(lse).
    scene = one_room(6, 40)
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


# ------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("background", [False, True])
def test_masked_queries(background: bool, backend: str) -> None:
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
def test_a_mask_over_every_query(background: bool, backend: str) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, background=background)
    inputs = inputs._replace(query_mask=torch.ones(plan.n_queries, dtype=torch.bool))
    result = answer(inputs, plan, backend)
    assert not result.out.any()
    assert not any(grad.any() for grad in result.grads)


def test_the_gradient_of_a_masked_query_reaches_no_background(backend: str) -> None:
    plan = crowded_scene().plan()
    inputs = make_inputs(plan, background=True, mask=True).fresh()
    assert inputs.query_mask is not None
    out, _ = inputs.attend(plan, backend)
    cotangent = torch.ones_like(out).masked_fill(inputs.query_mask[:, None, None], torch.nan)
    assert inputs.background is not None
    for grad in torch.autograd.grad(out, (*inputs.background, inputs.k, inputs.v), cotangent):
        assert grad.isfinite().all()


def test_whatever_a_masked_query_holds_has_no_effect(backend: str) -> None:
    plan = crowded_scene().plan()
    inputs = make_inputs(plan, background=True, mask=True)
    assert inputs.query_mask is not None
    assert inputs.background is not None
    masked = inputs.query_mask
    spoiled = inputs._replace(
        q=inputs.q.masked_fill(masked[:, None, None], torch.nan),
        background=inputs.background._replace(
            query=inputs.background.query.masked_fill(masked[:, None, None, None], torch.nan)
        ),
    )
    before, after = answer(inputs, plan, backend), answer(spoiled, plan, backend)
    assert_same_answers(after, before, 1e-13)


# ----------------------------------------------------------------------------------- dropout


def kept_weights(plan: NeighborhoodPlan, backend: str, rate: float, seed: int = 0) -> Tensor:
    """``[N, H, nnz]`` after dropout, read off by values that are unit vectors."""
    inputs = make_inputs(plan)
    units = torch.eye(plan.n_points, dtype=torch.float64)[:, None].expand(-1, 2, -1)
    torch.manual_seed(seed)
    return inputs._replace(v=units).attend(plan, backend, dropout_p=rate)[0]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.85])
def test_dropout_drops_weights_at_its_rate_and_scales_the_others(rate: float, backend: str) -> None:
    plan = one_room(200, 60).plan()
    full, dropped = kept_weights(plan, backend, 0.0), kept_weights(plan, backend, rate)
    kept = dropped != 0
    assert_close(dropped, torch.where(kept, full / (1 - rate), 0), 1e-13)
    deviation = math.sqrt(rate * (1 - rate) / kept.numel())
    assert abs(float((~kept).double().mean()) - rate) < 4 * deviation
    # Nor does it depend on the query, the head or the point.
    for axes in ((1, 2), (0, 2), (0, 1)):
        means = (~kept).double().mean(axes)
        share = math.sqrt(rate * (1 - rate) * len(means) / kept.numel())
        assert ((means - rate).abs() < 5 * share).all()
    heads = (~kept).double().unbind(1)
    both = float((heads[0] * heads[1]).mean())
    assert abs(both - rate**2) < 6 * deviation, "heads are independent"


def test_dropout_is_right_in_expectation() -> None:
    backend = "cpu"  # the other drops the same
    plan = scene_2d(n_queries=20).plan()
    inputs = make_inputs(plan, background=True, mask=True)
    full = inputs.attend(plan, backend)[0]
    draws = torch.stack([inputs.attend(plan, backend, dropout_p=0.3)[0] for _ in range(300)])
    error = draws.std(0) / math.sqrt(len(draws))
    off = (draws.mean(0) - full).abs()
    seen = error > 0
    assert seen.any()
    assert not off[~seen].any()
    assert (off[seen] / error[seen]).max() < 5
    assert (off[seen] / error[seen]).pow(2).mean().sqrt() < 1.3


def test_dropout_follows_the_seed(backend: str) -> None:
    plan = scene_2d(n_queries=20).plan()
    first, again, other = (kept_weights(plan, backend, 0.5, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    one, two = (make_inputs(plan).attend(plan, backend, dropout_p=0.5)[0] for _ in range(2))
    assert not torch.equal(one, two), "every call draws anew"


def test_both_backends_drop_the_same() -> None:
    plan = crowded_scene(60, 100).plan()
    cpu, reference = kept_weights(plan, "cpu", 0.5), kept_weights(plan, "reference", 0.5)
    assert torch.equal(cpu != 0, reference != 0)
    assert_close(cpu, reference, 1e-13)


@pytest.mark.parametrize("rate", [1e-12, 0.999999])
def test_extreme_rates(rate: float, backend: str) -> None:
    plan = one_room(50, 40).plan()
    kept = kept_weights(plan, backend, rate) != 0
    assert bool(kept.all()) if rate < 0.5 else int(kept.sum()) < 5


def test_no_dropout_draws_no_random_numbers(backend: str) -> None:
    plan = scene_2d().plan()
    state = torch.get_rng_state()
    make_inputs(plan).attend(plan, backend)
    assert torch.equal(torch.get_rng_state(), state)
    make_inputs(plan).attend(plan, backend, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------------------- gradients


def tiny_plan() -> NeighborhoodPlan:
    plan = make_scene(((5,), (3,)), (5, 3), (3, 0, 2), 9).plan()
    assert plan.counts().sum() > 5
    return plan


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_gradcheck(background: bool, dropout_p: float, backend: str) -> None:
    plan = tiny_plan()
    inputs = make_inputs(plan, width=2, value_width=1, background=background, mask=True).fresh()

    def attend(*leaves: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        out, lse = inputs.with_leaves(leaves).attend(plan, backend, dropout_p=dropout_p)
        return out, torch.where(lse.isfinite(), lse, 0)

    fast = backend == "reference"  # slow to call, and it has but the gradients of its parts
    assert torch.autograd.gradcheck(attend, inputs.leaves(), fast_mode=fast)


@pytest.mark.parametrize("needed", range(6))
def test_gradients_of_one_input_alone(needed: int, backend: str) -> None:
    plan = tiny_plan()
    inputs = make_inputs(plan, background=True)
    expected = answer(inputs, plan, "reference").grads[needed]
    leaves = [leaf.detach() for leaf in inputs.leaves()]
    leaves[needed].requires_grad_()
    actual = differentiate_one(inputs.with_leaves(leaves), plan, backend, leaves[needed])
    assert_close(actual, expected, EXACT)


def differentiate_one(inputs: Inputs, plan: NeighborhoodPlan, backend: str, leaf: Tensor) -> Tensor:
    """The gradient of ``leaf`` under the cotangents of `differentiate`."""
    generator = torch.Generator().manual_seed(11)
    out, lse = inputs.attend(plan, backend)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (out, lse)]
    lse = torch.where(lse.isfinite(), lse, 0)
    (grad,) = torch.autograd.grad((out * weights[0]).sum() + (lse * weights[1]).sum(), leaf)
    return grad


@pytest.mark.parametrize("which", ["out", "lse"])
def test_gradients_of_one_output_alone(which: str, backend: str) -> None:
    scene = one_room(9, 20)
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


def test_the_plan_and_the_mask_are_left_alone(backend: str) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, background=True, mask=True).fresh()
    copies = [leaf.detach().clone() for leaf in inputs.leaves()]
    pairs = plan.pairs()
    answer(inputs, plan, backend, dropout_p=0.5)
    assert torch.equal(plan.pairs(), pairs)
    for leaf, copy in zip(inputs.leaves(), copies, strict=True):
        assert torch.equal(leaf, copy)


# ----------------------------------------------------------------------- strides, not copies


def rearranged(x: Tensor, layout: str) -> Tensor:
    """``x`` ``[n, H, d]``, the same numbers with other strides."""
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
           "every other channel", "a part of a larger one"]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [1, 6])
def test_strides(layout: str, width: int, backend: str) -> None:
    plan = crowded_scene(50, 80).plan()
    inputs = make_inputs(plan, heads=3, width=width, value_width=width)

    def attend(leaves: Inputs) -> tuple[Tensor, Tensor]:
        views = leaves.map(lambda x: rearranged(x, layout))
        assert width == 1 or not views.k.is_contiguous()
        return views.attend(plan, backend)

    assert_same_answers(differentiate(inputs, attend), answer(inputs, plan, backend), 1e-13)


def test_expanded_inputs_and_gradients(backend: str) -> None:
    # Strides of zero, and the expanded gradient of a plain sum.
    scene = one_room(9, 20)
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


def test_a_mask_with_strides(backend: str) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, mask=True)
    assert inputs.query_mask is not None
    strided = inputs._replace(query_mask=inputs.query_mask.repeat_interleave(2)[::2])
    assert torch.equal(strided.attend(plan, backend)[0], inputs.attend(plan, backend)[0])


# ---------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan, background=True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out, _ = inputs.attend(plan, backend)
    assert out.dtype == dtype
    assert torch.equal(out, inputs.map(lambda x: x.to(dtype)).attend(plan, backend)[0])


def test_autocast_leaves_float64_alone(backend: str) -> None:
    plan = scene_2d().plan()
    inputs = make_inputs(plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = inputs.attend(plan, backend)
    assert torch.equal(out, inputs.attend(plan, backend)[0])


# ------------------------------------------------------------------------------- determinism


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_same_bits_for_any_number_of_threads(
    background: bool, dropout_p: float, backend: str
) -> None:
    # Of thousands of queries: work comes in many pieces. In float32 the order of every sum shows.
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
def test_the_same_plan_for_any_number_of_threads() -> None:
    scene = crowded_scene(3000, 3000)
    torch.set_num_threads(1)
    first = scene.plan()
    torch.set_num_threads(3)
    second = scene.plan()
    for left, right in (
        (first._tensors.query_slices, second._tensors.query_slices),
        (first._point_slices, second._point_slices),
    ):
        assert all(map(torch.equal, left, right))


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("background", [False, True])
def test_nothing_uninitialised_is_read_or_returned(background: bool, backend: str) -> None:
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


# ---------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_weights(background: bool, mask: bool, backend: str) -> None:
    scene = scene_2d(n_queries=24)
    plan = scene.plan()
    inputs = make_inputs(plan, background=background, mask=mask)
    q, k, v, cells, query_mask = inputs
    out, _ = inputs.attend(plan, backend)
    result = neighborhood_attention_weights(q, k, plan, background=cells, query_mask=query_mask)
    offsets, points, weights, empty = result
    takes_part = torch.ones(24, dtype=torch.bool) if query_mask is None else ~query_mask
    assert offsets.dtype == points.dtype == torch.int64
    assert offsets.diff().tolist() == (plan.counts() * takes_part).tolist()
    assert (int(offsets[0]), int(offsets[-1])) == (0, len(points))
    query = torch.repeat_interleave(offsets.diff())
    listed = set(zip(query.tolist(), points.tolist(), strict=True))
    assert listed == {(i, p) for i, p in scene.pairs() if takes_part[i]}

    total = torch.zeros(24, 2, dtype=torch.float64).index_add(0, query, weights)
    rebuilt = torch.zeros_like(out).index_add(0, query, weights[..., None] * v[points])
    if cells is not None:
        assert empty is not None
        assert empty.shape == (24, 3, 2)
        total = total + empty.sum(1)
        values = cells.value[torch.tensor(scene.images())]
        rebuilt = rebuilt + (empty[..., None] * values).sum(1)
        sees = takes_part
    else:
        assert empty is None
        sees = takes_part & (plan.counts() > 0)
    assert_close(total, sees.double()[:, None].expand(-1, 2), 1e-13)
    assert_close(rebuilt, out, 1e-13)
    assert (weights >= 0).all()


def test_weights_of_some_queries() -> None:
    scene = scene_2d(n_queries=24)
    plan = scene.plan()
    inputs = make_inputs(plan, background=True, mask=True)
    everything = neighborhood_attention_weights(
        inputs.q, inputs.k, plan, background=inputs.background, query_mask=inputs.query_mask
    )
    chosen = torch.tensor([20, 3, 3, 7], dtype=torch.int32)
    some = neighborhood_attention_weights(
        inputs.q,
        inputs.k,
        plan,
        background=inputs.background,
        query_mask=inputs.query_mask,
        queries=chosen,
    )
    assert everything.background is not None
    assert some.background is not None
    for place, query in enumerate(chosen.tolist()):
        here = slice(*some.offsets[place : place + 2].tolist())
        there = slice(*everything.offsets[query : query + 2].tolist())
        assert torch.equal(some.points[here], everything.points[there])
        assert_close(some.weights[here], everything.weights[there], 1e-14)
        assert_close(some.background[place], everything.background[query], 1e-14)
    none = neighborhood_attention_weights(inputs.q, inputs.k, plan, queries=chosen[:0].long())
    assert none.offsets.tolist() == [0]
    assert len(none.points) == len(none.weights) == 0


def test_weights_follow_the_scale() -> None:
    plan = one_room(5, 8).plan()
    inputs = make_inputs(plan)
    flat = neighborhood_attention_weights(inputs.q, inputs.k, plan, scale=0.0)
    assert_close(flat.weights, torch.full_like(flat.weights, 1 / 8), 1e-15)


# --------------------------------------------------------------------------------- refusals

PLAN = scene_2d().plan()  # 12 queries, 60 points, 3 levels, 43 slots, 3 images


def accepted() -> dict[str, Any]:
    inputs = make_inputs(PLAN, background=True, mask=True)
    return {**inputs._asdict(), "plan": PLAN}


def nested(arguments: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """``arguments`` with one replaced; ``background.key`` is a part of one."""
    if "." not in name:
        return arguments | {name: value}
    whole, part = name.split(".")
    return arguments | {whole: arguments[whole]._replace(**{part: value})}


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64} | options)


SHARED_REFUSALS: list[tuple[str, Any, str]] = [
    ("q", zeros(11, 2, 4), "[11, 2, 4]"),
    ("q", zeros(12, 8), "[12, 8]"),
    ("q", zeros(12, 2, 4, dtype=torch.int64), "int64"),
    ("q", zeros(12, 2, 4, device="meta"), "meta"),
    ("q", zeros(12, 2, 4).to_sparse(), "sparse"),
    ("q", [1.0], "list"),
    ("k", zeros(59, 2, 4), "[59, 2, 4]"),
    ("k", zeros(60, 3, 4), "[60, 3, 4]"),
    ("k", zeros(60, 2, 5), "[60, 2, 5]"),
    ("k", zeros(60, 2, 4, dtype=torch.float32), "float32"),
    ("k", zeros(60, 2, 4, device="meta"), "meta"),
    ("background.query", zeros(12, 2, 2, 4), "[12, 2, 2, 4]"),
    ("background.query", zeros(12, 3, 2, 4, dtype=torch.float32), "float32"),
    ("background.key", zeros(42, 2, 4), "[42, 2, 4]"),
    ("background.key", zeros(43, 2, 4, device="meta"), "meta"),
    ("background.value", zeros(2, 3, 2, 4), "[2, 3, 2, 4]"),
    ("background.value", zeros(3, 3, 2, 4, dtype=torch.int32), "int32"),
    ("query_mask", torch.zeros(11, dtype=torch.bool), "[11]"),
    ("query_mask", torch.zeros(12), "float32"),
    ("query_mask", torch.zeros(12, dtype=torch.bool, device="meta"), "meta"),
]  # fmt: skip


def assert_refused(call: Any, arguments: dict[str, Any], name: str, value: Any, came: str) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="expected") as refusal:
        call(**nested(arguments, name, value))
    message = str(refusal.value)
    assert message.startswith(f"{name}:"), message
    assert came in message.split("got")[-1], message
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "value", "came"),
    [
        *SHARED_REFUSALS,
        ("v", zeros(59, 2, 4), "[59, 2, 4]"),
        ("v", zeros(60, 3, 4), "[60, 3, 4]"),
        ("v", zeros(60, 2, 4, dtype=torch.float32), "float32"),
        ("v", zeros(60, 2, 4, device="meta"), "meta"),
        ("background.value", zeros(3, 3, 2, 5), "[3, 3, 2, 5]"),
        ("dropout_p", 1.0, "1.0"),
        ("dropout_p", -0.1, "-0.1"),
        ("dropout_p", math.nan, "nan"),
        ("backend", "cuda", "cuda"),
    ],
)
def test_refusals(name: str, value: Any, came: str) -> None:
    arguments = {"dropout_p": 0.5, **accepted()}
    neighborhood_attention(**arguments)
    assert_refused(neighborhood_attention, arguments, name, value, came)


@pytest.mark.parametrize(
    ("name", "value", "came"),
    [*SHARED_REFUSALS, ("queries", torch.rand(3), "float32"),
     ("queries", torch.zeros(3, 1, dtype=torch.int64), "[3, 1]")],
)  # fmt: skip
def test_weights_refusals(name: str, value: Any, came: str) -> None:
    arguments = accepted()
    del arguments["v"]
    neighborhood_attention_weights(**arguments)
    assert_refused(neighborhood_attention_weights, arguments, name, value, came)


def test_the_cpu_backend_says_why_it_cannot_run_elsewhere() -> None:
    plan = PLAN.to("meta")
    inputs = make_inputs(PLAN).map(lambda x: x.to("meta"))
    with pytest.raises(ValueError, match=r"backend: expected .*meta.* got 'cpu': .*CPU"):
        neighborhood_attention(*inputs[:3], plan, backend="cpu")


def test_background_is_a_named_triple() -> None:
    assert Background._fields == ("query", "key", "value")


# ------------------------------------------------------------------------ what is not a number


def nonfinite(x: Tensor) -> set[int]:
    """Rows of ``x`` that hold a number that is not finite."""
    return set((~x.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("point", [0, 18])  # padding reads point 0
def test_what_is_not_a_number_reaches_the_queries_that_see_it(
    point: int, name: str, bad: float, backend: str
) -> None:
    scene = scene_2d(n_queries=60, n_points=60, seed=4)
    plan, pairs = scene.plan(), scene.pairs()
    inputs = make_inputs(plan, width=3)
    clean = answer(inputs, plan, backend)
    rows = getattr(inputs, name).clone()
    rows[point] = bad
    spoiled = inputs._replace(**{name: rows})
    result = answer(spoiled, plan, backend)

    seers = {query for query, seen in pairs if seen == point}
    assert 0 < len(seers) < 60
    # Not all of these if the logits are minus infinity: such a weight is zero.
    reached = nonfinite(oracle(scene, spoiled)[0])
    assert reached == seers or (name == "k" and math.isinf(bad) and reached < seers)
    assert nonfinite(result.out) == reached
    others = [query for query in range(60) if query not in seers]
    assert_close(result.out[others], clean.out[others], 1e-13)
    assert_close(result.grads[0][others], clean.grads[0][others], 1e-13, "gradient of q")
    # Points that none of these queries sees are as far from it.
    apart = [p for p in range(60) if not any((query, p) in pairs for query in seers)]
    assert 0 < len(apart) < 60
    for index in (1, 2):
        assert_close(result.grads[index][apart], clean.grads[index][apart], 1e-13, index)


def test_a_query_that_is_not_a_number_spoils_no_other(backend: str) -> None:
    scene = scene_2d(n_queries=60, n_points=60)
    plan, pairs = scene.plan(), scene.pairs()
    inputs = make_inputs(plan, width=3)
    clean = answer(inputs, plan, backend)
    query = next(query for query, _ in sorted(pairs))
    spoiled = inputs.q.clone()
    spoiled[query] = torch.nan
    result = answer(inputs._replace(q=spoiled), plan, backend)
    assert nonfinite(result.out) == {query}
    seen = {point for seer, point in pairs if seer == query}
    assert nonfinite(result.grads[1]) == seen
    apart = [point for point in range(60) if point not in seen]
    for index in (1, 2):
        assert_close(result.grads[index][apart], clean.grads[index][apart], 1e-13, index)


def test_a_gradient_that_is_not_a_number_reaches_what_its_query_sees(backend: str) -> None:
    scene = scene_2d(n_queries=60, n_points=60)
    plan, pairs = scene.plan(), scene.pairs()
    inputs = make_inputs(plan, width=3).fresh()
    query = max(query for query, _ in pairs)
    out, _ = inputs.attend(plan, backend)
    cotangent = torch.ones_like(out)
    cotangent[query] = torch.nan
    grads = torch.autograd.grad(out, inputs.leaves(), cotangent)
    seen = {point for seer, point in pairs if seer == query}
    assert [nonfinite(grad) for grad in grads] == [{query}, seen, seen]


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_what_is_not_a_number_in_the_background_reaches_whose_cell_is_empty(
    part: str, backend: str
) -> None:
    scene = scene_2d(n_queries=60, n_points=60)
    plan = scene.plan()
    inputs = make_inputs(plan, width=3, background=True)
    assert inputs.background is not None
    cells = getattr(inputs.background, part).clone()
    place = {"query": (7, 1), "key": (20,), "value": (2, 1)}[part]
    cells[place] = torch.nan
    spoiled = inputs._replace(background=inputs.background._replace(**{part: cells}))
    result, _ = spoiled.attend(plan, backend)
    reached = nonfinite(oracle(scene, spoiled)[0])
    assert 0 < len(reached) < 60
    assert nonfinite(result) == reached
    rest = [query for query in range(60) if query not in reached]
    assert_close(result[rest], inputs.attend(plan, backend)[0][rest], 1e-13)


def test_masked_queries_stay_zero_whatever_they_would_see(backend: str) -> None:
    plan = one_room(20, 15).plan()
    inputs = make_inputs(plan, mask=True)
    assert inputs.query_mask is not None
    spoiled = inputs._replace(k=inputs.k * torch.nan, v=inputs.v * torch.nan)
    result = answer(spoiled, plan, backend)
    assert nonfinite(result.out) == set((~inputs.query_mask).nonzero()[:, 0].tolist())
    assert not result.out[inputs.query_mask].any()
    assert not result.grads[0][inputs.query_mask].any()


# ---------------------------------------------------------------------------------- far away


@pytest.mark.parametrize("center", [2**31, 2**32])
def test_columns_beyond_32_bits(center: int, backend: str) -> None:
    # Which cells of a window are empty is told by the last coordinates of points and centres.
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
