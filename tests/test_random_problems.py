"""A few of the random problems of ``python -m tests.random_problems``, and what they catch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_problems import loops
from random_problems.check import MismatchError, run_problem
from random_problems.problem import Problem, draw_problem
from random_problems.windows import LevelWindow

import vicinal
from vicinal._utils.types import BackendName

Wrap = Callable[..., Any]
Kind = Callable[[LevelWindow], bool]


@pytest.mark.parametrize("first", range(0, 24, 8))
def test_random_problems(first: int, backend: BackendName) -> None:
    for seed in range(first, first + 8):
        assert run_problem(seed, backend, gradients=seed % 2 == 0) <= 1e-11


def find_seed(condition: Callable[[Problem], bool]) -> int:
    return next(seed for seed in range(2000) if condition(draw_problem(seed)))


def count_pairs(problem: Problem, **changes: Any) -> int:
    problem = dataclasses.replace(problem, **changes)
    return sum(len(slot.points) for slots in loops.windows(problem) for slot in slots)


def is_crowded(problem: Problem) -> bool:
    """Whether queries attend to some points, none of them masked, and a block does so too."""
    return problem.mask is None and problem.block is not None and count_pairs(problem) > 5


def depends_on_windows(problem: Problem, **changes: Any) -> bool:
    """Whether windows with these changes have another number of neighbors."""
    windows = tuple(window._replace(**changes) for window in problem.windows)
    return count_pairs(problem, windows=windows) != count_pairs(problem)


def is_full(problem: Problem) -> bool:
    """Whether it is crowded, with a rotary block, no seam, and windows as in images."""
    if not all(window.is_plain() and not window.is_off() for window in problem.windows):
        return False
    direct = not problem.periodic_axes and problem.through == "pyramid" and problem.seed % 4 > 0
    if not (direct and is_crowded(problem) and problem.block and problem.block["rotary"]):
        return False
    wider = [w._replace(sizes=tuple(size + 10 for size in w.sizes)) for w in problem.windows]
    return count_pairs(problem, windows=wider) > count_pairs(problem)


def has_window(kind: Kind) -> Callable[[Problem], bool]:
    return lambda problem: any(map(kind, problem.windows)) and is_crowded(problem)


def is_periodic_and_dilated(problem: Problem) -> bool:
    found = any(
        window.dilations[axis] > 1 and window.sizes[axis] > 1
        for window in problem.windows
        for axis in problem.periodic_axes
    )
    return found and is_crowded(problem)


def sees_other_levels(problem: Problem) -> bool:
    """Whether causal windows depend on the levels of the queries."""
    causal = any(any(window.causal) for window in problem.windows)
    return (
        causal
        and is_crowded(problem)
        and (count_pairs(problem, query_levels=None) != count_pairs(problem))
    )


def has_points_in_corners(problem: Problem) -> bool:
    """Whether there are points in the corners that its balls leave out."""
    ball = any(window.is_ball for window in problem.windows)
    return ball and is_crowded(problem) and depends_on_windows(problem, is_ball=False)


def has_points_in_gaps(problem: Problem) -> bool:
    """Whether there are points in the gaps of its dilated windows."""
    dilated = any(max(window.dilations) > 1 for window in problem.windows)
    ones = (1,) * problem.dim
    return dilated and is_crowded(problem) and depends_on_windows(problem, dilations=ones)


WINDOWS: dict[str, Kind] = {
    "dilated": lambda w: max(w.dilations) > 1 and max(w.sizes) > 1,
    "dilated per axis": lambda w: len(set(w.dilations)) > 1,
    "flat": lambda w: len(set(w.sizes)) > 1 and min(w.sizes) > 0 and not any(w.causal),
    "ball": lambda w: w.is_ball and max(w.sizes) > 3,
    "causal": lambda w: any(w.causal) and not all(w.causal),
    "causal along all axes": lambda w: all(w.causal) and len(w.causal) > 1,
    "causal and dilated": lambda w: any(w.causal) and max(w.dilations) > 1,
    "causal ball": lambda w: w.is_ball and any(w.causal) and max(w.sizes) > 2,
    "none": LevelWindow.is_off,
}
KINDS: dict[str, Callable[[Problem], bool]] = {
    **{name: has_window(kind) for name, kind in WINDOWS.items()},
    "periodic and dilated": is_periodic_and_dilated,
    "causal of other levels": sees_other_levels,
    "points in corners": has_points_in_corners,
    "points in gaps": has_points_in_gaps,
    "bias and background": lambda p: p.bias and p.background and is_crowded(p),
    "bias without background": lambda p: p.bias and not p.background and is_crowded(p),
}


@functools.cache
def seed_of(kind: str) -> int:
    return find_seed(KINDS[kind])


FULL = find_seed(is_full)
PERIODIC = find_seed(lambda p: is_crowded(p) and count_pairs(p) != count_pairs(p, periodic_axes=()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_problem_of_every_kind(kind: str, backend: BackendName) -> None:
    assert run_problem(seed_of(kind), backend, gradients=True) <= 1e-11


def off_by_little(function: Wrap) -> Wrap:
    def changed(*args: Any, **options: Any) -> Any:
        out, lse = function(*args, **options)
        return out + 1e-10, lse

    return changed


def wrong_gradient(function: Wrap) -> Wrap:
    def changed(*args: Any, **options: Any) -> Any:
        out, lse = function(*args, **options)
        return out + 1e-9 * (out - out.detach()), lse

    return changed


def wrong_log_sum_exp(function: Wrap) -> Wrap:
    def changed(*args: Any, **options: Any) -> Any:
        out, lse = function(*args, **options)
        return out, lse * (1 + 1e-9)

    return changed


def other_windows(change: Callable[[Any], Any]) -> Callable[[Wrap], Wrap]:
    def mutation(function: Wrap) -> Wrap:
        def changed(positions: Any, offsets: Any, pyramid: Any, sizes: Any, levels: Any) -> Any:
            return function(positions, offsets, pyramid, list(map(change, sizes)), levels)

        return changed

    return mutation


def change_window(**changes: Any) -> Callable[[Wrap], Wrap]:
    return other_windows(
        lambda size: (
            dataclasses.replace(size, **changes) if isinstance(size, vicinal.Window) else size
        )
    )


larger_windows = other_windows(lambda size: size + 10)


def finest_levels(function: Wrap) -> Wrap:
    return lambda *args: function(*args[:-1], None)


def without_bias(function: Wrap) -> Wrap:
    return lambda *args, **options: function(*args, **options | {"bias": None})


def other_cells(function: Wrap) -> Wrap:
    def changed(*args: Any, **options: Any) -> Any:
        cells, outside, levels = function(*args, **options)
        return cells.flip(-1), outside.flip(1), levels

    return changed


def without_levels(forward: Wrap) -> Wrap:
    def changed(block: Any, **arguments: Any) -> Any:
        out = forward(block, **arguments)
        return out + 1e-10 * arguments["query"]

    return changed


@pytest.mark.parametrize(
    ("name", "mutation", "message"),
    [
        ("neighborhood_attention", off_by_little, "attention: "),
        ("neighborhood_attention", wrong_gradient, "gradient of"),
        ("neighborhood_attention", wrong_log_sum_exp, "log-sum-exp"),
        ("plan_neighborhoods", larger_windows, "pairs"),
        ("get_multilevel_neighborhoods", other_cells, "cells|outside"),
    ],
)
def test_a_wrong_function_is_caught(
    name: str, mutation: Callable[[Wrap], Wrap], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_problem(FULL, "cpu", gradients=True)
    monkeypatch.setattr(vicinal, name, mutation(getattr(vicinal, name)))
    with pytest.raises(MismatchError, match=message):
        run_problem(FULL, "cpu", gradients=True)


@pytest.mark.parametrize(
    ("kind", "name", "mutation", "message"),
    [
        ("points in gaps", "plan_neighborhoods", change_window(dilation=1), "pairs"),
        ("points in corners", "plan_neighborhoods", change_window(shape="box"), "pairs"),
        ("causal of other levels", "plan_neighborhoods", finest_levels, "pairs"),
        ("bias without background", "neighborhood_attention", without_bias, "attention: "),
        ("bias and background", "neighborhood_attention_weights", without_bias, "weights: "),
    ],
)
def test_a_wrong_window_is_caught(
    kind: str,
    name: str,
    mutation: Callable[[Wrap], Wrap],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vicinal, name, mutation(getattr(vicinal, name)))
    with pytest.raises(MismatchError, match=message):
        run_problem(seed_of(kind), "cpu", gradients=False)


def test_a_wrong_block_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    block = vicinal.SparseNeighborhoodAttentionBlock
    monkeypatch.setattr(block, "forward", without_levels(block.forward))
    with pytest.raises(MismatchError, match="block"):
        run_problem(FULL, "cpu", gradients=False)


def test_a_wrong_rotation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = vicinal.RotaryEncoding
    forward = rotary.forward
    monkeypatch.setattr(
        rotary, "forward", lambda self, x, places: forward(self, x, places + 1e-9 * places**2)
    )
    with pytest.raises(MismatchError, match="block"):
        run_problem(FULL, "cpu", gradients=False)


def test_a_seam_that_is_forgotten_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    build = vicinal.FeaturePyramid.__post_init__

    def forget(pyramid: Any, check_contents: bool | None) -> None:
        object.__setattr__(pyramid, "periodic_axes", ())
        build(pyramid, check_contents)

    run_problem(PERIODIC, "cpu", gradients=False)
    monkeypatch.setattr(vicinal.FeaturePyramid, "__post_init__", forget)
    with pytest.raises(MismatchError, match="pairs"):
        run_problem(PERIODIC, "cpu", gradients=False)


def test_a_problem_follows_from_its_seed() -> None:
    assert draw_problem(7) == draw_problem(7)
    assert draw_problem(7) != draw_problem(8)


def test_problems_are_of_every_kind() -> None:
    problems = [draw_problem(seed) for seed in range(200)]
    assert {problem.dim for problem in problems} == {1, 2, 3, 4}
    for kind in (
        lambda p: p.strides and any(min(step) > 1 for step in zip(*p.strides, strict=True)),
        lambda p: p.strides and any(len(set(steps)) > 1 for steps in p.strides),
        lambda p: len(p.periodic_axes) > 1,
        lambda p: len(set(p.coordinates)) < len(p.coordinates),
        lambda p: not p.coordinates,
        lambda p: not p.positions,
        lambda p: any(start == stop for start, stop in zip(p.offsets, p.offsets[1:], strict=False)),
        lambda p: any(max(map(abs, x)) > 1e10 for x in p.positions),
        lambda p: p.mask is not None and all(p.mask) and p.positions,
        lambda p: any(max(w.sizes) > max(s) for w, s in zip(p.windows, p.shapes, strict=True)),
        lambda p: all(window.is_plain() for window in p.windows) and p.dim > 1,
        lambda p: p.block is not None and p.block["relative_bias"],
        lambda p: p.block is not None and p.block["rotary_values"] and p.periodic_axes,
        lambda p: p.block is not None and p.block["point_dim"],
    ):
        assert any(map(kind, problems))


def test_numbers_of_a_problem_in_float32_are_representable() -> None:
    positions = torch.tensor(draw_problem(FULL, np.float32).positions, dtype=torch.float64)
    assert torch.equal(positions.float().double(), positions)
