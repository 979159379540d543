"""The raw ops of the CPU back end refuse arguments that do not fit each other."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from block_scenes import own_calls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "one row less": lambda x: x[1:],
    "no rows": lambda x: x[:0],
    "one row more": lambda x: torch.cat((x, x[:1])),
    "no first dimension": lambda x: x[0],
    "one dimension more": lambda x: x[None],
    "transposed": lambda x: x.transpose(0, -1),
    "transposed and contiguous": lambda x: x.transpose(0, -1).contiguous(),
    "flat": lambda x: x.flatten(),
    "reversed shape": lambda x: x.reshape(x.shape[::-1]),
    "one column": lambda x: x.reshape(-1, 1),
    "other dtype": lambda x: x.to(torch.float16 if x.is_floating_point() else torch.int16),
    "complex": lambda x: x.to(torch.complex64),
}


def mutated(x: Any) -> Iterator[Any]:
    """``x`` with one tensor in it changed in one way; changes that leave it alike are left out."""
    if isinstance(x, list):
        for index, part in enumerate(x):
            yield from ([*x[:index], other, *x[index + 1 :]] for other in mutated(part))
        if x and isinstance(x[0], Tensor):
            yield from (x[:-1], [*x, x[-1], x[-1]])
    elif isinstance(x, Tensor) and x.dim():
        for change in CHANGES.values():
            other = change(x)
            if (other.shape, other.dtype, other.stride()) != (x.shape, x.dtype, x.stride()):
                yield other


def fresh(x: Any) -> Any:
    if isinstance(x, list):
        return [fresh(part) for part in x]
    return x.detach().clone() if isinstance(x, Tensor) else x


def assert_same(result: Any, expected: Any) -> None:
    for left, right in zip(result, expected, strict=True):
        if isinstance(left, Tensor):
            assert torch.equal(left.nan_to_num(), right.nan_to_num())
        else:
            assert_same(left, right)


# Arguments with a size that nothing else fixes: images of the background, keys, levels.
FREE = {
    ("neighborhood_attention", 5),
    ("neighborhood_attention_backward", 9),
    ("find_slices", 0),
    ("find_slices", 1),
    ("rotate", 0),  # in any floating dtype
}


@pytest.mark.parametrize("name", ["neighborhood_attention", "neighborhood_attention_backward",
                                  "rotate", "rotate_backward", "find_slices"])  # fmt: skip
def test_other_shapes_are_refused_or_change_nothing(name: str) -> None:
    op, arguments = own_calls()[name]
    arguments = tuple(fresh(list(arguments)))
    refused = 0
    for index, argument in enumerate(arguments):
        for other in mutated(argument):
            changed = (*arguments[:index], other, *arguments[index + 1 :])
            try:
                result = op(*changed)
            except (RuntimeError, IndexError):
                refused += 1
                continue
            if (name, index) not in FREE:
                assert isinstance(argument, Tensor)
                assert torch.equal(other, argument)  # other strides
                expected = op(*arguments)
                assert_same(*((x,) if isinstance(x, Tensor) else x for x in (result, expected)))
    assert refused > 20


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan")])
def test_other_dropout_rates_are_refused(rate: float) -> None:
    op, arguments = own_calls()["neighborhood_attention"]
    with pytest.raises(RuntimeError, match="dropout_p"):
        op(*arguments[:-1], rate)


@pytest.mark.parametrize("windows", [[3, -5, 3], [3, 4, 3], [3, 0, 3], [2**62 + 1, 5, 3], []])
def test_other_windows_are_refused(windows: list[int]) -> None:
    op, arguments = own_calls()["neighborhood_attention"]
    at = next(i for i, x in enumerate(arguments) if str(x) == "[3, 5, 3]")
    with pytest.raises(RuntimeError, match="vicinal"):
        op(*arguments[:at], windows, *arguments[at + 1 :])


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="negative"):
        torch.ops.vicinal.new_rows(torch.zeros(1), -1, 4)


def all_calls() -> dict[str, tuple[Any, list[Any]]]:
    """The ops, those of the projections too, with arguments that fit."""
    calls = {name: (op, fresh(list(arguments))) for name, (op, arguments) in own_calls().items()}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    x, weights, norm, grads = draw(5, 6), [draw(4, 6)], [draw(6), draw(6)], [draw(5, 4)]
    ops = torch.ops.vicinal
    calls["project"] = ops.project.default, [x, weights, [draw(4)], norm, 1e-5, draw(5, 4)]
    backward = [grads, x, weights, norm, 1e-5, True, True, True]
    calls["project_backward"] = ops.project_backward.default, backward
    return calls


def changed(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``x`` with every tensor in it changed."""
    if isinstance(x, list | tuple):
        return [changed(part, change) for part in x]
    return change(x) if isinstance(x, Tensor) else x


def described(result: Any, device: str) -> Any:
    """The shape and dtype of every tensor, all of which are on ``device``."""
    if isinstance(result, list | tuple):
        return [described(part, device) for part in result]
    assert result.device.type == device
    return result.shape, result.dtype


def test_meta_and_fake_tensors() -> None:
    calls = all_calls()
    assert len(calls) == 9
    for op, arguments in calls.values():
        expected = described(op(*arguments), "cpu")
        assert described(op(*changed(arguments, lambda x: x.to("meta"))), "meta") == expected
        mode = FakeTensorMode()
        faked = changed(arguments, mode.from_tensor)
        with mode:
            assert described(op(*faked), "cpu") == expected


def test_a_mix_of_devices_is_refused() -> None:
    refused = 0
    for op, arguments in all_calls().values():
        for index, argument in enumerate(arguments):
            moved = changed(argument, lambda x: x.to("meta"))
            if any(isinstance(x, Tensor) for x in tree_leaves(argument)):
                with pytest.raises(RuntimeError, match="device"):
                    op(*arguments[:index], moved, *arguments[index + 1 :])
                refused += 1
    assert refused > 30
