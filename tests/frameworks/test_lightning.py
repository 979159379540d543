"""Lightning trains on batches of pyramids, which it moves by their method `to`."""

from typing import Any

import pytest
import torch
from frameworks.small_model import SmallModel, make_samples
from torch import Tensor
from torch.utils.data import DataLoader

from vicinal import FeaturePyramid, collate_pyramids

# Of the package itself, on import and of torch's names that it uses.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*is deprecated:FutureWarning",
    "ignore:.*num_workers:UserWarning",
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*logging interval:UserWarning",
    "ignore::DeprecationWarning",
)
pl = pytest.importorskip("pytorch_lightning")


def make_training(seen: list[FeaturePyramid]) -> Any:
    class Training(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = SmallModel()

        def training_step(self, batch: tuple[FeaturePyramid, Tensor], batch_idx: int) -> Tensor:
            pyramid, labels = batch
            seen.append(pyramid)
            loss = torch.nn.functional.cross_entropy(self.model(pyramid), labels)
            self.log("loss", loss, on_epoch=True, batch_size=pyramid.batch_size)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Training()


def test_a_step_is_that_of_plain_torch() -> None:
    samples, seen = make_samples(4), list[FeaturePyramid]()
    training = make_training(seen)
    plain = SmallModel()
    plain.load_state_dict(training.model.state_dict())
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(training, DataLoader(samples, batch_size=4, collate_fn=collate_pyramids))  # type: ignore[arg-type]
    pyramid, labels = collate_pyramids(samples)
    assert [batch.batch_size for batch in seen] == [4]
    assert torch.equal(seen[0].values, pyramid.values)
    loss = torch.nn.functional.cross_entropy(plain(pyramid), labels)
    loss.backward()
    torch.testing.assert_close(trainer.logged_metrics["loss_epoch"], loss.detach())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            expected = parameter - 0.1 * parameter.grad
            torch.testing.assert_close(training.model.get_parameter(name).detach(), expected)


def test_batches_move_with_their_pyramids() -> None:
    training = make_training([])
    batch = collate_pyramids(make_samples(2))
    moved, labels = training.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert isinstance(moved, FeaturePyramid)
    assert moved.values.device.type == moved.coordinates.device.type == labels.device.type == "meta"
    assert moved.level_shapes == batch[0].level_shapes
