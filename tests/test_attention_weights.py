"""`neighborhood_attention_weights`: the weights of every query and point."""

import pytest
import torch
from problems import assert_close, full_window_scene, make_inputs, scene_2d

from vicinal import neighborhood_attention_weights
from vicinal._utils.types import BackendName


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_weights_match_pairs_and_output(background: bool, mask: bool, backend: BackendName) -> None:
    scene = scene_2d(n_queries=24)
    plan = scene.plan()
    inputs = make_inputs(plan, background=background, mask=mask)
    q, k, v, cells, query_mask, _ = inputs
    out, _ = inputs.attend(plan, backend)
    result = neighborhood_attention_weights(q, k, plan, background=cells, query_mask=query_mask)
    offsets, points, weights, empty = result
    unmasked = torch.ones(24, dtype=torch.bool) if query_mask is None else ~query_mask
    assert offsets.dtype == points.dtype == torch.int64
    assert offsets.diff().tolist() == (plan.counts() * unmasked).tolist()
    assert (int(offsets[0]), int(offsets[-1])) == (0, len(points))
    query = torch.repeat_interleave(offsets.diff())
    listed = set(zip(query.tolist(), points.tolist(), strict=True))
    assert listed == {(i, p) for i, p in scene.pairs() if unmasked[i]}

    total = torch.zeros(24, 2, dtype=torch.float64).index_add(0, query, weights)
    rebuilt = torch.zeros_like(out).index_add(0, query, weights[..., None] * v[points])
    if cells is not None:
        assert empty is not None
        assert empty.shape == (24, 3, 2)
        total = total + empty.sum(1)
        values = cells.value[torch.tensor(scene.images())]
        rebuilt = rebuilt + (empty[..., None] * values).sum(1)
        attends = unmasked
    else:
        assert empty is None
        attends = unmasked & (plan.counts() > 0)
    assert_close(total, attends.double()[:, None].expand(-1, 2), 1e-13)
    assert_close(rebuilt, out, 1e-13)
    assert (weights >= 0).all()


def test_weights_of_selected_queries() -> None:
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
    for row, query in enumerate(chosen.tolist()):
        of_row = slice(*some.offsets[row : row + 2].tolist())
        of_query = slice(*everything.offsets[query : query + 2].tolist())
        assert torch.equal(some.points[of_row], everything.points[of_query])
        assert_close(some.weights[of_row], everything.weights[of_query], 1e-14)
        assert_close(some.background[row], everything.background[query], 1e-14)
    none = neighborhood_attention_weights(inputs.q, inputs.k, plan, queries=chosen[:0].long())
    assert none.offsets.tolist() == [0]
    assert len(none.points) == len(none.weights) == 0


def test_weights_follow_the_scale() -> None:
    plan = full_window_scene(5, 8).plan()
    inputs = make_inputs(plan)
    flat = neighborhood_attention_weights(inputs.q, inputs.k, plan, scale=0.0)
    assert_close(flat.weights, torch.full_like(flat.weights, 1 / 8), 1e-15)
