"""A few of the random problems of ``python -m tests.random_problems``, and what they catch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from random_problems.check import MismatchError, run_problem
from random_problems.problem import Problem, draw_problem

import vicinal

Wrap = Callable[..., Any]


@pytest.mark.parametrize("first", range(0, 24, 8))
def test_random_problems(first: int, backend: str) -> None:
    for seed in range(first, first + 8):
        assert run_problem(seed, backend, gradients=seed % 2 == 0) <= 1e-11


def find_seed(condition: Callable[[Problem], bool]) -> int:
    return next(seed for seed in range(500) if condition(draw_problem(seed)))


def is_full(problem: Problem) -> bool:
    """Whether a block attends to some points, from unmasked queries, with positions inside."""
    plain = problem.mask is None and not problem.periodic_axes and problem.through == "pyramid"
    crowded = len(problem.positions) > 5 and len(problem.coordinates) > 10
    return plain and crowded and problem.block is not None and max(problem.sizes) > 1


FULL = find_seed(is_full)
PERIODIC = find_seed(lambda p: bool(p.periodic_axes) and len(p.positions) > 5 and max(p.sizes) > 1)


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


def larger_windows(function: Wrap) -> Wrap:
    def changed(positions: Any, offsets: Any, pyramid: Any, sizes: Any) -> Any:
        return function(positions, offsets, pyramid, [size + 2 for size in sizes])

    return changed


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
        lambda p: any(w > max(shape) for w, shape in zip(p.sizes, p.shapes, strict=True)),
    ):
        assert any(map(kind, problems))


def test_numbers_of_a_problem_in_float32_are_representable() -> None:
    positions = torch.tensor(draw_problem(FULL, np.float32).positions, dtype=torch.float64)
    assert torch.equal(positions.float().double(), positions)
