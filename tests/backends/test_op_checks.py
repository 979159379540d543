"""The raw ops of the compiled back ends refuse arguments that do not fit each other."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from block_scenes import own_calls
from problems import OwnOps, make_inputs, plan_by_triton, scene_2d
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from vicinal import RotaryEncoding
from vicinal._utils.types import BackendName

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "one row less": lambda x: x[1:],
    "no rows": lambda x: x[:0],
    "one row more": lambda x: torch.cat((x, x[:1])),
    "no first dimension": lambda x: x[:1].squeeze(0),
    "one dimension more": lambda x: x[None],
    "transposed": lambda x: x.transpose(0, -1),
    "transposed and contiguous": lambda x: x.transpose(0, -1).contiguous(),
    "column of a table": lambda x: torch.stack((x, x.flip(0)), 1)[:, 0] if x.dim() == 1 else x,
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


def all_calls() -> dict[str, tuple[Any, list[Any]]]:
    """The ops of the CPU back end, those of the projections too, with arguments that fit."""
    calls = {name: (op, fresh(list(arguments))) for name, (op, arguments) in own_calls().items()}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    x, weights, norm, grads = draw(5, 6), [draw(4, 6)], [draw(6), draw(6)], [draw(5, 4)]
    ops = torch.ops.vicinal
    calls["project"] = ops.project.default, [x, weights, [draw(4)], norm, 1e-5, draw(5, 4)]
    backward = [grads, x, weights, norm, 1e-5, True, True, True]
    calls["project_backward"] = ops.project_backward.default, backward
    calls["layer_norm"] = ops.layer_norm.default, [x, *norm, 1e-5]
    _, *moments = ops.layer_norm(x, *norm, 1e-5)
    backward = [draw(5, 6), x, *moments, norm[0], True, True]
    calls["layer_norm_backward"] = ops.layer_norm_backward.default, backward
    return calls


def triton_calls() -> dict[str, tuple[Any, list[Any]]]:
    """The ops of the Triton back end with arguments that fit, on its device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scene = scene_2d(n_queries=12, n_points=20)
    plan = scene.plan().to(device)
    inputs = make_inputs(plan, heads=1, background=True, mask=True, dtype=torch.float32)
    moved = inputs.map(lambda x: x.to(device))
    moved = moved._replace(query_mask=torch.arange(12, device=device) % 3 == 1).fresh()
    with OwnOps("vicinal_triton") as ops:
        ids = torch.arange(20, device=device)
        plan = plan.with_dropout_ids(ids[:12], ids, 20)
        moved.attend(plan, "triton", dropout_p=0.1)[0].sum().backward()
        encoding = RotaryEncoding(4, 1, 2, backend="triton").to(device)
        x = torch.randn(12, 1, 4, device=device, requires_grad=True)
        encoding(x, torch.rand(12, 3, device=device)).sum().backward()
        plan_by_triton(scene, device)
    return {name: (op, fresh(list(arguments))) for name, (op, arguments) in ops.calls.items()}


CALLS = {"cpu": functools.cache(all_calls), "triton": functools.cache(triton_calls)}
NAMES = {
    "cpu": [
        "neighborhood_attention", "neighborhood_attention_backward", "rotate", "rotate_backward",
        "find_slices", "project", "project_backward", "layer_norm", "layer_norm_backward",
    ],
    "triton": [
        "neighborhood_attention", "neighborhood_attention_backward", "rotate", "rotate_backward",
        "find_query_slices", "find_point_slices", "find_runs", "find_lists",
    ],
}  # fmt: skip
# Arguments with a size that nothing else fixes: images of the background, keys, levels; and lists
# that may be empty.
FREE = {
    ("neighborhood_attention", 5),
    ("neighborhood_attention_backward", 9),
    ("find_slices", 0),
    ("find_slices", 1),
    ("find_query_slices", 0),  # any number of queries, in any floating dtype
    ("find_query_slices", 1),
    ("find_query_slices", 2),
    ("find_query_slices", 5),
    ("find_query_slices", 6),
    ("find_lists", 1),  # empty tables, of any strides; the lists' unused space has any contents
    ("find_point_slices", 0),
    ("find_point_slices", 4),
    ("rotate", 1),  # in any floating dtype
    ("rotate", 2),
    ("rotate_backward", 2),
    ("rotate_backward", 3),
    ("rotate", 0),  # in any floating dtype
    ("layer_norm", 0),
    ("project", 2),
    ("project", 3),
    ("project_backward", 3),
}


@pytest.mark.parametrize(
    ("backend", "name"), [(backend, name) for backend, names in NAMES.items() for name in names]
)
@pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")
@pytest.mark.usefixtures("runs_by_reference")
def test_other_shapes_are_refused_or_change_nothing(backend: BackendName, name: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    op, arguments = CALLS[backend]()[name]
    arguments = fresh(arguments)
    refused = 0
    for index, argument in enumerate(arguments):
        for other in mutated(argument):
            changed = (*arguments[:index], other, *arguments[index + 1 :])
            try:
                result = op(*changed)
            except (RuntimeError, IndexError, ValueError):
                refused += 1
                continue
            if (name, index) not in FREE:
                assert_same([other], [argument])  # other strides
                expected = op(*arguments)
                assert_same(*((x,) if isinstance(x, Tensor) else x for x in (result, expected)))
    assert refused > 20


@pytest.mark.parametrize(
    ("argument", "index", "change"),
    [
        ("x", 0, lambda x: x[1:]),
        ("weights", 1, lambda weights: [weights[0].t()]),
        ("weights", 1, lambda weights: [weights[0].to(torch.float32)]),
        ("biases", 2, lambda biases: [*biases, biases[0]]),
        ("biases", 2, lambda biases: [biases[0][:1]]),
        ("norm", 3, lambda norm: norm[:1]),
        ("norm", 3, lambda norm: [norm[0][:1], norm[1]]),
        ("residual", 5, lambda residual: residual[:1]),
        ("residual", 5, lambda residual: residual[:, :1]),
        ("residual", 5, lambda residual: residual[None]),
        ("residual", 5, lambda residual: residual.to(torch.float32)),
    ],
)
def test_refusals_of_projections_name_the_argument(argument: str, index: int, change: Any) -> None:
    op, arguments = all_calls()["project"]
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match="residual" if argument == "x" else argument):
        op(*arguments)


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


@pytest.mark.parametrize("backend", CALLS)
@pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")
@pytest.mark.usefixtures("runs_by_reference")
def test_a_mix_of_devices_is_refused(backend: BackendName) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    refused = 0
    for op, arguments in CALLS[backend]().values():
        for index, argument in enumerate(arguments):
            moved = changed(argument, lambda x: x.to("meta"))
            others = [*arguments[:index], *arguments[index + 1 :]]
            if all(
                any(isinstance(x, Tensor) for x in tree_leaves(part)) for part in (argument, others)
            ):
                kinds: tuple[type[Exception], ...] = (RuntimeError,)
                where = "device"
                if isinstance(argument, list | tuple) and len(argument) == 3:
                    # Torch does not see devices of the background, a list that may be None;
                    # kernels refuse them.
                    kinds, where = (RuntimeError, ValueError), "device|on the CPU|on meta"
                with pytest.raises(kinds, match=where):
                    op(*arguments[:index], moved, *arguments[index + 1 :])
                refused += 1
    assert refused > 25
