"""The study of the demo's boxes, on little data."""

import math
import sys

import pytest
import torch

from benchmarks import detection_study
from benchmarks.detection_study import VARIANTS, TwoRateAdamW, best_overlaps, run
from examples.digits.model import DigitDetector
from examples.digits.scenes import Batch
from vicinal.detr import Detections


@pytest.mark.parametrize(
    ("name", "n_stages"),
    [("half the learning rate in stem and encoder", 3), ("3 decoder layers", 4)],
)
def test_a_variant_is_trained_and_tested(name: str, n_stages: int) -> None:
    result = run(VARIANTS[name], canvases=2, tests=1, seed=0)
    assert len(result.stages) == n_stages - 1  # the last is the AP
    assert result.seconds > 0
    assert math.isfinite(result.loss)
    assert 0 <= result.ap <= result.ap50 <= 1


def test_some_parameters_have_a_rate_of_their_own() -> None:
    slow, fast, bias = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = TwoRateAdamW(
        (x for x in (slow, bias)),
        0.25,
        [{"params": [slow, fast]}, {"params": [bias]}],
        eps=0.0,
        weight_decay=0.0,
    )
    for _ in range(2):  # as the loop does
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for parameter in (slow, fast, bias):
            parameter.grad = torch.ones(2)
        optimizer.step()
    for parameter, rate in ((slow, 0.025), (fast, 0.1), (bias, 0.025)):
        torch.testing.assert_close(parameter.detach(), torch.full((2,), -2 * rate))


def test_every_activation_is_replaced() -> None:
    model = DigitDetector()
    n_before = sum(isinstance(x, torch.nn.GELU) for x in model.modules())
    VARIANTS["ReLU"].change(model)
    assert not any(isinstance(x, torch.nn.GELU) for x in model.modules())
    assert sum(isinstance(x, torch.nn.ReLU) for x in model.modules()) == n_before > 0


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = detection_study.Result(0.9, 0.8, 0.7, 0.85, [0.5, 0.6], 1.25, 3.5)
    monkeypatch.setattr(detection_study, "run", lambda *_: result)
    monkeypatch.setattr(sys, "argv", ["study", "--variants", "the demo", "--seeds", "0", "1"])
    detection_study.main()
    shown = capsys.readouterr().out
    assert shown.count("0.900") == 4  # two rows as they come, and in the table
    assert "0.500, 0.600" in shown


def test_only_digits_that_are_found_count() -> None:
    boxes = torch.tensor([[10.0, 10, 8, 8], [40, 40, 8, 8], [80, 80, 8, 8]])
    labels, none = torch.tensor([1, 2, 3]), torch.zeros(0)
    batch = Batch(none, none, boxes, labels, torch.tensor([0, 3]))
    found = Detections(
        boxes + torch.tensor([0.0, 0, 8, 0]),  # twice as high
        torch.tensor([1, 2, 4]),  # the last is wrong
        torch.tensor([0.9, 0.1, 0.9]),  # the second is not sure
        torch.arange(3),
        torch.tensor([0, 3]),
    )
    assert best_overlaps(found, batch).tolist() == [0.5]
