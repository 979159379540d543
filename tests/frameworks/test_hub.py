"""Models with the mixin of the Hugging Face Hub, in a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from frameworks.small_model import SmallModel, make_batch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")


def make_class() -> Any:
    class HubModel(SmallModel, hub.PyTorchModelHubMixin):  # type: ignore[misc, name-defined]
        pass

    return HubModel


def test_models_are_read_as_they_were_written(tmp_path: Path) -> None:
    hub_class, pyramid = make_class(), make_batch(2)
    model = hub_class(n_classes=3)
    model.save_pretrained(tmp_path)
    restored = hub_class.from_pretrained(tmp_path, local_files_only=True)
    assert (tmp_path / "model.safetensors").exists()
    assert torch.equal(restored(pyramid), model(pyramid))
    assert list(restored.state_dict()) == list(model.state_dict())
