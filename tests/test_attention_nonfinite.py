"""NaN and infinity reach only the queries and points that are related to them."""

import math

import pytest
import torch
from problems import answer, assert_close, full_window_scene, make_inputs, oracle, scene_2d
from torch import Tensor

from vicinal._utils.types import BackendName


def nonfinite(x: Tensor) -> set[int]:
    """Rows of ``x`` with a NaN or an infinity."""
    return set((~x.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("point", [0, 18])  # padding reads point 0
def test_nonfinite_points_reach_only_queries_that_attend_to_them(
    point: int, name: str, bad: float, backend: BackendName
) -> None:
    scene = scene_2d(n_queries=60, n_points=60, seed=4)
    plan, pairs = scene.plan(), scene.pairs()
    inputs = make_inputs(plan, width=3)
    clean = answer(inputs, plan, backend)
    rows = getattr(inputs, name).clone()
    rows[point] = bad
    with_nonfinite = inputs._replace(**{name: rows})
    result = answer(with_nonfinite, plan, backend)

    attending = {query for query, neighbor in pairs if neighbor == point}
    assert 0 < len(attending) < 60
    # A logit of minus infinity gives a weight of zero, so fewer queries may be affected.
    reached = nonfinite(oracle(scene, with_nonfinite)[0])
    assert reached == attending or (name == "k" and math.isinf(bad) and reached < attending)
    assert nonfinite(result.out) == reached
    others = [query for query in range(60) if query not in attending]
    assert_close(result.out[others], clean.out[others], 1e-13)
    assert_close(result.grads[0][others], clean.grads[0][others], 1e-13, "gradient of q")
    # Gradients of points that these queries do not attend to are unaffected.
    apart = [p for p in range(60) if not any((query, p) in pairs for query in attending)]
    assert 0 < len(apart) < 60
    for index in (1, 2):
        assert_close(result.grads[index][apart], clean.grads[index][apart], 1e-13, index)


def test_nan_query_does_not_affect_other_queries(backend: BackendName) -> None:
    scene = scene_2d(n_queries=60, n_points=60)
    plan, pairs = scene.plan(), scene.pairs()
    inputs = make_inputs(plan, width=3)
    clean = answer(inputs, plan, backend)
    query = next(query for query, _ in sorted(pairs))
    with_nonfinite = inputs.q.clone()
    with_nonfinite[query] = torch.nan
    result = answer(inputs._replace(q=with_nonfinite), plan, backend)
    assert nonfinite(result.out) == {query}
    neighbors = {point for other, point in pairs if other == query}
    assert nonfinite(result.grads[1]) == neighbors
    apart = [point for point in range(60) if point not in neighbors]
    for index in (1, 2):
        assert_close(result.grads[index][apart], clean.grads[index][apart], 1e-13, index)


def test_nan_gradient_reaches_only_points_its_query_attends_to(backend: BackendName) -> None:
    scene = scene_2d(n_queries=60, n_points=60)
    plan, pairs = scene.plan(), scene.pairs()
    inputs = make_inputs(plan, width=3).fresh()
    query = max(query for query, _ in pairs)
    out, _ = inputs.attend(plan, backend)
    cotangent = torch.ones_like(out)
    cotangent[query] = torch.nan
    grads = torch.autograd.grad(out, inputs.leaves(), cotangent)
    neighbors = {point for other, point in pairs if other == query}
    assert [nonfinite(grad) for grad in grads] == [{query}, neighbors, neighbors]


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_nan_in_the_background_reaches_only_queries_with_that_empty_cell(
    part: str, backend: BackendName
) -> None:
    scene = scene_2d(n_queries=60, n_points=60)
    plan = scene.plan()
    inputs = make_inputs(plan, width=3, background=True)
    assert inputs.background is not None
    cells = getattr(inputs.background, part).clone()
    index = {"query": (7, 1), "key": (20,), "value": (2, 1)}[part]
    cells[index] = torch.nan
    with_nonfinite = inputs._replace(background=inputs.background._replace(**{part: cells}))
    result, _ = with_nonfinite.attend(plan, backend)
    reached = nonfinite(oracle(scene, with_nonfinite)[0])
    assert 0 < len(reached) < 60
    assert nonfinite(result) == reached
    rest = [query for query in range(60) if query not in reached]
    assert_close(result[rest], inputs.attend(plan, backend)[0][rest], 1e-13)


def test_masked_queries_stay_zero_among_nan_points(backend: BackendName) -> None:
    plan = full_window_scene(20, 15).plan()
    inputs = make_inputs(plan, mask=True)
    assert inputs.query_mask is not None
    with_nonfinite = inputs._replace(k=inputs.k * torch.nan, v=inputs.v * torch.nan)
    result = answer(with_nonfinite, plan, backend)
    assert nonfinite(result.out) == set((~inputs.query_mask).nonzero()[:, 0].tolist())
    assert not result.out[inputs.query_mask].any()
    assert not result.grads[0][inputs.query_mask].any()
