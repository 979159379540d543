"""Dropout of attention weights."""

import math

import pytest
import torch
from problems import assert_close, crowded_scene, full_window_scene, make_inputs, scene_2d
from torch import Tensor

from vicinal import NeighborhoodPlan
from vicinal._utils.types import BackendName


def kept_weights(
    plan: NeighborhoodPlan, backend: BackendName, rate: float, seed: int = 0
) -> Tensor:
    """Weights ``[N, H, nnz]`` after dropout, read from the output for one-hot values."""
    inputs = make_inputs(plan)
    units = torch.eye(plan.n_points, dtype=torch.float64)[:, None].expand(-1, 2, -1)
    torch.manual_seed(seed)
    return inputs._replace(v=units).attend(plan, backend, dropout_p=rate)[0]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.85])
def test_dropout_drops_weights_at_its_rate_and_scales_the_others(
    rate: float, backend: BackendName
) -> None:
    plan = full_window_scene(200, 60).plan()
    full, dropped = kept_weights(plan, backend, 0.0), kept_weights(plan, backend, rate)
    kept = dropped != 0
    assert_close(dropped, torch.where(kept, full / (1 - rate), 0), 1e-13)
    deviation = math.sqrt(rate * (1 - rate) / kept.numel())
    assert abs(float((~kept).double().mean()) - rate) < 4 * deviation
    # The rate is the same for every query, head and point.
    for axes in ((1, 2), (0, 2), (0, 1)):
        means = (~kept).double().mean(axes)
        share = math.sqrt(rate * (1 - rate) * len(means) / kept.numel())
        assert ((means - rate).abs() < 5 * share).all()
    heads = (~kept).double().unbind(1)
    both = float((heads[0] * heads[1]).mean())
    assert abs(both - rate**2) < 6 * deviation, "heads are independent"


def test_dropout_is_unbiased() -> None:
    backend: BackendName = "cpu"  # the reference back end drops the same weights
    plan = scene_2d(n_queries=20).plan()
    inputs = make_inputs(plan, background=True, mask=True)
    full = inputs.attend(plan, backend)[0]
    draws = torch.stack([inputs.attend(plan, backend, dropout_p=0.3)[0] for _ in range(300)])
    error = draws.std(0) / math.sqrt(len(draws))
    off = (draws.mean(0) - full).abs()
    varies = error > 0
    assert varies.any()
    assert not off[~varies].any()
    assert (off[varies] / error[varies]).max() < 5
    assert (off[varies] / error[varies]).pow(2).mean().sqrt() < 1.3


def test_dropout_follows_the_seed(backend: BackendName) -> None:
    plan = scene_2d(n_queries=20).plan()
    first, again, other = (kept_weights(plan, backend, 0.5, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    one, two = (make_inputs(plan).attend(plan, backend, dropout_p=0.5)[0] for _ in range(2))
    assert not torch.equal(one, two), "every call draws a new mask"


def test_backends_drop_the_same_weights() -> None:
    plan = crowded_scene(60, 100).plan()
    cpu, reference = kept_weights(plan, "cpu", 0.5), kept_weights(plan, "reference", 0.5)
    assert torch.equal(cpu != 0, reference != 0)
    assert_close(cpu, reference, 1e-13)


@pytest.mark.parametrize("rate", [1e-12, 0.999999])
def test_extreme_dropout_rates(rate: float, backend: BackendName) -> None:
    plan = full_window_scene(50, 40).plan()
    kept = kept_weights(plan, backend, rate) != 0
    assert bool(kept.all()) if rate < 0.5 else int(kept.sum()) < 5


def test_random_state_is_unchanged_without_dropout(backend: BackendName) -> None:
    plan = scene_2d().plan()
    state = torch.get_rng_state()
    make_inputs(plan).attend(plan, backend)
    assert torch.equal(torch.get_rng_state(), state)
    make_inputs(plan).attend(plan, backend, dropout_p=0.5)
    assert not torch.equal(torch.get_rng_state(), state)
