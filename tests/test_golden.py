"""The block against the golden cases: output and every gradient, float64, within 1e-11."""

from typing import Any

import golden_cases
import pytest

from vicinal import SparseNeighborhoodAttentionBlock
from vicinal._utils.types import BackendName

TOLERANCE = 1e-11


@pytest.mark.parametrize("name", golden_cases.NAMES)
def test_golden_case(name: str, backend: BackendName) -> None:
    case = golden_cases.load(name)
    block = SparseNeighborhoodAttentionBlock(**case.config, backend=backend).double()
    block.load_state_dict(case.state_dict, strict=True)
    arguments: dict[str, Any] = case.arguments()
    out = block(**arguments)
    (out * case.cotangent).sum().backward()

    errors = {"out": (out - case.out).abs().max().item()}
    for key, expected in case.grads.items():
        if key.startswith("param."):
            name = key.removeprefix("param.").replace("subset_attn.", "")
            grad = block.get_parameter(name).grad
        elif key == "map_values":
            grad = arguments["stacked_feature_maps"].grad
            grad = None if grad is None else grad.coalesce().values()
        else:
            grad = arguments[key].grad
        assert grad is not None, key
        errors[key] = (grad - expected).abs().max().item()
    assert max(errors.values()) < TOLERANCE, errors
