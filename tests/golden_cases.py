"""The golden cases: float64 inputs, outputs and gradients of the earlier implementation."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

NAMES = sorted(path.stem for path in (Path(__file__).parent / "golden").glob("*.npz"))


@dataclass
class GoldenCase:
    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    inputs: dict[str, Tensor]
    cotangent: Tensor
    out: Tensor
    grads: dict[str, Tensor]

    def arguments(self) -> dict[str, Tensor]:
        """Fresh leaves for a block's forward; all floating ones require gradients."""
        inputs = {name: value.clone() for name, value in self.inputs.items()}
        size = inputs.pop("map_size").tolist()
        indices, values = inputs.pop("map_indices"), inputs.pop("map_values")
        coo = torch.sparse_coo_tensor(indices, values, size, check_invariants=True)
        inputs["stacked_feature_maps"] = coo
        for value in inputs.values():
            value.requires_grad_(value.is_floating_point())
        return inputs


def load(name: str) -> GoldenCase:
    np = pytest.importorskip("numpy")
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    config = json.loads(str(arrays.pop("config")))
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}

    def group(prefix: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }

    inputs = group("in.")
    cotangent = inputs.pop("cotangent")
    return GoldenCase(config, group("param."), inputs, cotangent, tensors["out"], group("grad."))
