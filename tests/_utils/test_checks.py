"""Argument checks: errors name the argument, what was expected and what came."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vicinal._utils import checks
from vicinal._utils.strides import as_strides

CPU = torch.device("cpu")
SPARSE = torch.eye(2).to_sparse()


def assert_refused(argument: str, came: str, function: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected ") as refusal:
        function(*args)
    assert came in str(refusal.value).rsplit(", got ", 1)[-1]


@pytest.mark.parametrize(
    ("value", "came"),
    [
        ([[1.0, 2.0]], "list"),
        (torch.rand(3), "[3]"),
        (torch.rand(3, 3), "[3, 3]"),
        (torch.ones(3, 2, dtype=torch.int64), "int64"),
        (torch.rand(3, 2, device="meta"), "meta"),
        (SPARSE, "sparse"),
    ],
)
def test_check_tensor_refuses_other_types_shapes_kinds_and_devices(value: Any, came: str) -> None:
    def check(x: Any) -> None:
        checks.check_tensor("points", x, ("n", 2), kind="floating", device=CPU)

    check(torch.rand(3, 2))
    check(torch.rand(0, 2, dtype=torch.bfloat16))
    assert_refused("points", came, check, value)


@pytest.mark.parametrize(
    ("kind", "accepted"),
    [
        ("any", {torch.float32, torch.int32, torch.bool, torch.complex64}),
        ("floating", {torch.float32}),
        ("integer", {torch.int32}),
        ("bool", {torch.bool}),
    ],
)
def test_kinds_of_dtypes(kind: str, accepted: set[torch.dtype]) -> None:
    def check(x: Tensor) -> None:
        checks.check_tensor("x", x, (2,), kind=kind)

    for dtype in (torch.float32, torch.int32, torch.bool, torch.complex64):
        x = torch.zeros(2, dtype=dtype)
        if dtype in accepted:
            check(x)
        else:
            assert_refused("x", str(dtype), check, x)


@pytest.mark.parametrize(
    "shapes", [[[4, 3], [2, 1]], ((4, 3), (2, 1)), torch.tensor([[4, 3], [2, 1]]),
               [np.array([4, 3]).tolist(), [np.int64(2), np.int32(1)]]]
)  # fmt: skip
def test_level_shapes_of_any_type(shapes: Any) -> None:
    result = checks.as_level_shapes(shapes)
    assert result == ((4, 3), (2, 1))
    assert {type(size) for row in result for size in row} == {int}


@pytest.mark.parametrize(
    ("shapes", "came"),
    [
        ([], "[]"),
        ([[]], "[[]]"),
        ([4, 3], "[4, 3]"),
        ([[4, 3], [2]], "[[4, 3], [2]]"),
        ([[4, 0]], "[[4, 0]]"),
        ([[4, 1.5]], "1.5"),
        ([[4, True]], "True"),
        (torch.ones(2, 2), "float32"),
        (torch.tensor([4, 3]), "[2]"),
    ],
)
def test_invalid_level_shapes(shapes: Any, came: str) -> None:
    assert_refused("shapes", came, checks.as_level_shapes, shapes, "shapes")


def test_as_integer() -> None:
    assert [checks.as_integer(x) for x in (3, np.int64(4), torch.tensor(5))] == [3, 4, 5]
    assert [checks.as_integer(x) for x in (True, 3.0, "3", None)] == [None] * 4


@pytest.mark.parametrize("wrong", [0, -1, 1.0, True, None])
def test_invalid_counts(wrong: Any) -> None:
    def check(heads: int) -> None:
        checks.check_counts(layers=1, heads=heads)

    check(8)
    assert_refused("heads", str(wrong), check, wrong)


@pytest.mark.parametrize("wrong", [0, -1.0, float("inf"), float("nan"), "4"])
def test_invalid_cell_sizes(wrong: Any) -> None:
    checks.check_cells("size", 0.5)
    assert_refused("size", str(wrong), checks.check_cells, "size", wrong)


@pytest.mark.parametrize("wrong", [1, 1.5, -0.1, float("nan"), "0"])
def test_invalid_dropout_rates(wrong: Any) -> None:
    checks.check_dropout("dropout", 0)
    checks.check_dropout("dropout", 0.99)
    assert_refused("dropout", str(wrong), checks.check_dropout, "dropout", wrong)


def test_contents_are_read_on_the_cpu_by_default() -> None:
    meta = torch.device("meta")
    assert checks.reads_contents(None, CPU)
    assert not checks.reads_contents(None, meta)
    assert checks.reads_contents(True, meta)
    assert not checks.reads_contents(False, CPU)


def test_check_finite_names_the_first_row() -> None:
    x = torch.zeros(4, 2)
    checks.check_finite("positions", x)
    x[2, 1], x[3, 0] = torch.nan, torch.inf
    assert_refused("positions", "row 2", checks.check_finite, "positions", x)


@pytest.mark.parametrize(
    ("wrong", "came"),
    [([1, 2, 5], "from 1"), ([0, 3, 2, 5], "2 after 3"), ([0, 2, 4], "to 4"), ([0, 2, 6], "to 6")],
)
def test_invalid_offsets(wrong: list[int], came: str) -> None:
    checks.check_offsets("offsets", torch.tensor([0, 2, 2, 5]), 5)
    assert_refused("offsets", came, checks.check_offsets, "offsets", torch.tensor(wrong), 5)


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(10_000),
        [torch.arange(10_000)],
        np.arange(10_000),
        list(range(10_000)),
        {"points": list(range(10_000))},
    ],
)
def test_descriptions_never_list_a_whole_tensor(value: Any) -> None:
    assert len(checks.describe(value)) < 250


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.Size([3, 4]), "torch.Size([3, 4])"),
        (torch.nn.Identity(), "Identity()"),
        (torch.device("cpu"), "device(type='cpu')"),
        (np.int64(3), "np.int64(3)"),
        ((3, 4), "tuple (3, 4)"),
        (3, "int 3"),
        ("tuple(", "str 'tuple('"),
        (None, "NoneType None"),
    ],
)
def test_descriptions_name_the_type_once(value: Any, expected: str) -> None:
    assert checks.describe(value) == expected


def test_numbers_are_floats_or_integers_that_no_float_equals() -> None:
    given = [2, np.int64(2**62 + 1), np.float32(0.5), 2**53 + 1]
    numbers = checks.as_numbers("x", given, 4)
    assert numbers == (2.0, 2**62 + 1, 0.5, 2**53 + 1)
    assert [type(number) for number in numbers] == [float, int, float, int]
    assert checks.as_numbers("x", np.array([2**63 + 1], np.uint64), 1) == (2**63 + 1,)
    assert checks.as_numbers("x", torch.tensor(3), 2) == (3.0, 3.0)
    for wrong in ([1.0, math.nan], [1.0, True], [1, 10**400], torch.ones(2, 1), None):
        assert_refused("x", checks.describe(wrong)[:20], checks.as_numbers, "x", wrong, 2)


@pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.int64, device="meta"), SPARSE])
def test_tensors_without_contents_are_no_lists(value: Tensor) -> None:
    for check, argument in (
        (lambda: checks.as_numbers("x", value, 2), "x"),
        (lambda: checks.as_level_shapes(value, "x"), "x"),
        (lambda: checks.as_spatial_shape(value), "spatial_shape"),
        (lambda: as_strides(value, 2), "strides"),
    ):
        assert_refused(argument, "tensor", check)


def test_numpy_arrays_serve_as_tensors() -> None:
    made = checks.check_tensor("x", np.ones((2, 3), np.float32), ("n", 3), kind="floating")
    assert torch.equal(made, torch.ones(2, 3))
    assert checks.as_level_shapes(np.array([[4, 3], [2, 1]])) == ((4, 3), (2, 1))
    assert checks.as_level_shapes([torch.Size([4, 3])]) == ((4, 3),)
    assert_refused("x", "<U1", checks.check_tensor, "x", np.array(["a"]), (1,))


def test_rows_are_all_rows_or_valid_indices() -> None:
    def check(rows: Tensor | None) -> list[int]:
        checked = checks.check_rows("rows", rows, 4, CPU)
        assert checked.dtype == torch.int64
        return checked.tolist()

    assert check(None) == [0, 1, 2, 3]
    assert check(torch.tensor([3, 0, 3], dtype=torch.uint8)) == [3, 0, 3]
    assert check(torch.tensor([], dtype=torch.int32)) == []
    for wrong, came in (
        (torch.tensor([0, 4]), "from 0 to 4"),
        (torch.tensor([-1, 2]), "from -1 to 2"),
        (torch.tensor([0.0]), "float32"),
        (torch.tensor([[0]]), "[1, 1]"),
    ):
        assert_refused("rows", came, check, wrong)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(4, 3)[::-1, ::-1],
        np.arange(12.0).reshape(4, 3).astype(">f8"),
        np.broadcast_to(np.arange(3.0), (4, 3)),
    ],
)
def test_arrays_of_any_strides_and_byte_order_serve_as_tensors(array: Any) -> None:
    made = checks.check_tensor("x", array, ("n", 3), kind="floating")
    assert made.tolist() == array.tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_unsigned_integers_serve_as_integers(dtype: Any) -> None:
    made = checks.check_tensor("x", np.array([3, 200], dtype), (2,), kind="integer")
    assert made.min().item() == 3
    if dtype is np.uint64:
        assert_refused("x", "uint64", checks.check_tensor, "x", np.array([2**63], dtype), (1,))
