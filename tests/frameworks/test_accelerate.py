"""Accelerate prepares loaders of pyramids and moves their batches."""

from typing import Any

import pytest
import torch
from frameworks.small_model import SmallModel, make_samples
from torch.utils.data import DataLoader

from vicinal import FeaturePyramid, collate_pyramids

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
accelerate = pytest.importorskip("accelerate")


def make_loader(samples: list[Any], batch_size: int) -> DataLoader[Any]:
    return DataLoader(samples, batch_size=batch_size, collate_fn=collate_pyramids)  # type: ignore[arg-type]


def test_steps_are_those_of_plain_torch() -> None:
    samples, model, plain = make_samples(5), SmallModel(), SmallModel()
    plain.load_state_dict(model.state_dict())
    optimizer, its_optimizer = (torch.optim.SGD(x.parameters(), lr=0.1) for x in (model, plain))
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model, optimizer, make_loader(samples, 2))
    sizes = []
    for pyramid, labels in prepared[2]:
        sizes.append(pyramid.batch_size)
        accelerator.backward(torch.nn.functional.cross_entropy(prepared[0](pyramid), labels))
        prepared[1].step()
        prepared[1].zero_grad()
    for pyramid, labels in make_loader(samples, 2):
        torch.nn.functional.cross_entropy(plain(pyramid), labels).backward()
        its_optimizer.step()
        its_optimizer.zero_grad()
    assert sizes == [2, 2, 1]
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter)


def test_batches_move_with_their_pyramids() -> None:
    batch = {"points": collate_pyramids(make_samples(2))[0], "labels": torch.zeros(2)}
    moved = accelerate.utils.send_to_device(batch, torch.device("meta"), non_blocking=True)
    assert isinstance(moved["points"], FeaturePyramid)
    assert moved["points"].coordinates.device.type == moved["labels"].device.type == "meta"


@pytest.mark.parametrize("n_processes", [2, 3])
def test_processes_read_whole_batches_of_their_own(n_processes: int) -> None:
    samples = make_samples(6)
    found: list[FeaturePyramid] = []
    for process in range(n_processes):
        share = accelerate.data_loader.prepare_data_loader(
            make_loader(samples, 1), num_processes=n_processes, process_index=process,
            put_on_device=False,
        )  # fmt: skip
        found += [pyramid for pyramid, _ in share]
    assert len(found) == 6
    values = {tuple(pyramid.values.flatten().tolist()) for pyramid in found}
    assert values == {tuple(pyramid.values.flatten().tolist()) for pyramid, _ in samples}
