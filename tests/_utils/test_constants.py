"""Constant tensors, and the op that makes them in compiled graphs."""

from collections.abc import Callable

import pytest
import torch
from problems import opcheck
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vicinal._utils import constants
from vicinal._utils.constants import cached_on_gpu, constant

CPU, META = torch.device("cpu"), torch.device("meta")
Find = Callable[..., tuple[Tensor, Tensor]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_constant_is_the_tensor_of_its_numbers(dtype: torch.dtype) -> None:
    for numbers in ([], [3], [1, -2, 2**40], [[1, 2, 3], [4, 5, 6]]):
        made = constant(numbers, CPU, dtype)
        assert torch.equal(made, torch.tensor(numbers, dtype=dtype))
        assert made.dtype == dtype


def test_constants_of_a_compiled_graph() -> None:
    def add(x: torch.Tensor) -> torch.Tensor:
        return x + constant([[1, 2], [3, 4]], x.device)

    x = torch.arange(4).view(2, 2)
    compiled = torch.compile(add, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), add(x))


def test_numbers_as_an_op() -> None:
    arguments = [1, 2, 3, 4], [2, 2], torch.float32, torch.device("cpu")
    assert torch.ops.vicinal.numbers(*arguments).tolist() == [[1, 2], [3, 4]]
    opcheck(torch.ops.vicinal.numbers.default, arguments)
    assert torch.Tag.cudagraph_unsafe in torch.ops.vicinal.numbers.default.tags


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The calls of the function `find_pair`; the meta device takes the part of a GPU."""
    monkeypatch.setattr(constants, "_CACHED_DEVICES", ("meta",))
    monkeypatch.setattr(constants, "_cache", {})
    return []


@pytest.fixture
def find_pair(calls: list[tuple[int, int]]) -> Find:
    @cached_on_gpu
    def find(first: int, device: torch.device, *, second: int = 0) -> tuple[Tensor, Tensor]:
        calls.append((first, second))
        return constant([first], device), constant([second], device)

    return find


def test_constants_of_a_function_are_cached_on_a_gpu(
    find_pair: Find, calls: list[tuple[int, int]]
) -> None:
    pair = find_pair(1, META)
    assert find_pair(1, META) is pair
    find_pair(1, META, second=2)
    find_pair(3, META)
    assert calls == [(1, 0), (1, 2), (3, 0)]
    for _ in range(2):
        assert [x.tolist() for x in find_pair(1, CPU)] == [[1], [0]]
    assert calls[3:] == [(1, 0)] * 2


def test_cached_constants_can_be_used_in_training(find_pair: Find) -> None:
    with torch.inference_mode():
        pair = find_pair(1, META)
    assert not any(x.is_inference() for x in pair)


def test_a_full_cache_is_emptied(
    find_pair: Find, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "_CACHE_SIZE", 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    for first in (1, 2, 3, 3, 1):
        find_pair(first, META)
    assert [first for first, _ in calls] == [1, 2, 3, 1]


def test_fake_constants_are_not_cached(find_pair: Find, calls: list[tuple[int, int]]) -> None:
    for _ in range(2):
        with FakeTensorMode():
            find_pair(1, META)
    assert type(find_pair(1, META)[0]) is Tensor
    assert calls == [(1, 0)] * 3


def test_a_graph_keeps_the_constants_that_it_reads(
    find_pair: Find, calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[object, object] = {}
    monkeypatch.setattr(constants, "_captured", kept)
    pair = find_pair(1, META)
    monkeypatch.setattr(constants, "execution_mode", lambda device: "graph")
    assert find_pair(1, META) is pair
    assert [*kept.values()] == [pair]
    for _ in range(2):  # found from constants that are cached, each of which the graph keeps
        find_pair(2, META)
    assert calls == [(1, 0), (2, 0), (2, 0)]


def test_compiled_code_does_not_cache(find_pair: Find, calls: list[tuple[int, int]]) -> None:
    def add(x: Tensor) -> Tensor:
        first, second = find_pair(1, x.device)
        return x + first + second

    torch.compile(add, fullgraph=True, backend="aot_eager")(torch.zeros(3, device="meta"))
    calls.clear()
    find_pair(1, META)
    assert calls == [(1, 0)]
