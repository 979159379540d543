"""Invalid arguments of `neighborhood_attention` and `neighborhood_attention_weights`."""

import math
from typing import Any

import pytest
import torch
from problems import make_inputs, scene_2d
from torch import Tensor

from vicinal import Background, neighborhood_attention, neighborhood_attention_weights
from vicinal.backends import choose_backend

PLAN = scene_2d().plan()  # 12 queries, 60 points, 3 levels, 43 slots, 3 images


def valid_arguments() -> dict[str, Any]:
    inputs = make_inputs(PLAN, background=True, mask=True)
    return {**inputs._asdict(), "plan": PLAN}


def nested(arguments: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """``arguments`` with ``name`` replaced; ``background.key`` names a field of ``background``."""
    if "." not in name:
        return arguments | {name: value}
    whole, part = name.split(".")
    return arguments | {whole: arguments[whole]._replace(**{part: value})}


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64} | options)


SHARED_INVALID: list[tuple[str, Any, str]] = [
    ("q", zeros(11, 2, 4), "[11, 2, 4]"),
    ("q", zeros(12, 8), "[12, 8]"),
    ("q", zeros(12, 2, 4, dtype=torch.int64), "int64"),
    ("q", zeros(12, 2, 4, device="meta"), "meta"),
    ("q", zeros(12, 2, 4).to_sparse(), "sparse"),
    ("q", [1.0], "list"),
    ("k", zeros(59, 2, 4), "[59, 2, 4]"),
    ("k", zeros(60, 3, 4), "[60, 3, 4]"),
    ("k", zeros(60, 2, 5), "[60, 2, 5]"),
    ("k", zeros(60, 2, 4, dtype=torch.float32), "float32"),
    ("k", zeros(60, 2, 4, device="meta"), "meta"),
    ("background.query", zeros(12, 2, 2, 4), "[12, 2, 2, 4]"),
    ("background.query", zeros(12, 3, 2, 4, dtype=torch.float32), "float32"),
    ("background.key", zeros(42, 2, 4), "[42, 2, 4]"),
    ("background.key", zeros(43, 2, 4, device="meta"), "meta"),
    ("background.value", zeros(2, 3, 2, 4), "[2, 3, 2, 4]"),
    ("background.value", zeros(3, 3, 2, 4, dtype=torch.int32), "int32"),
    ("plan", PLAN._tensors, "PlanTensors"),
    ("plan", None, "None"),
    ("query_mask", torch.zeros(11, dtype=torch.bool), "[11]"),
    ("query_mask", torch.zeros(12), "float32"),
    ("query_mask", torch.zeros(12, dtype=torch.bool, device="meta"), "meta"),
]  # fmt: skip


def assert_raises_for(
    call: Any, arguments: dict[str, Any], name: str, value: Any, came: str
) -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="expected") as refusal:
        call(**nested(arguments, name, value))
    message = str(refusal.value)
    assert message.startswith(f"{name}:"), message
    assert came in message.split("got")[-1], message
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "value", "came"),
    [
        *SHARED_INVALID,
        ("v", zeros(59, 2, 4), "[59, 2, 4]"),
        ("v", zeros(60, 3, 4), "[60, 3, 4]"),
        ("v", zeros(60, 2, 4, dtype=torch.float32), "float32"),
        ("v", zeros(60, 2, 4, device="meta"), "meta"),
        ("background.value", zeros(3, 3, 2, 5), "[3, 3, 2, 5]"),
        ("dropout_p", 1.0, "1.0"),
        ("dropout_p", -0.1, "-0.1"),
        ("dropout_p", math.nan, "nan"),
        ("backend", "cuda", "cuda"),
    ],
)
def test_invalid_arguments_raise(name: str, value: Any, came: str) -> None:
    arguments = {"dropout_p": 0.5, **valid_arguments()}
    neighborhood_attention(**arguments)
    assert_raises_for(neighborhood_attention, arguments, name, value, came)


@pytest.mark.parametrize(
    ("name", "value", "came"),
    [*SHARED_INVALID, ("queries", torch.rand(3), "float32"),
     ("queries", torch.zeros(3, 1, dtype=torch.int64), "[3, 1]")],
)  # fmt: skip
def test_invalid_arguments_of_weights_raise(name: str, value: Any, came: str) -> None:
    arguments = valid_arguments()
    del arguments["v"]
    neighborhood_attention_weights(**arguments)
    assert_raises_for(neighborhood_attention_weights, arguments, name, value, came)


def test_cpu_backend_on_another_device_raises_with_a_reason() -> None:
    with pytest.raises(ValueError, match=r"backend: expected .*cuda.* got 'cpu': .*CPU"):
        choose_backend("cpu", torch.device("cuda"), torch.float32, 8)


def test_fields_of_background() -> None:
    assert Background._fields == ("query", "key", "value")
