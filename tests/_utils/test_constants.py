"""Constant tensors, and the op that makes them in compiled graphs."""

import pytest
import torch
from problems import opcheck

from vicinal._utils.constants import constant

CPU = torch.device("cpu")


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
