"""Slices of a stream give what the whole gives at once, and the stream keeps what it needs."""

import sys
from types import ModuleType

import pytest
import torch
from detr_scenes import stir
from torch import Tensor

from examples import classify_points, stream_events
from examples.stream_events import (
    SENSOR,
    STEPS,
    EventStream,
    compare,
    make_model,
    move,
    moving_disks,
    times,
)
from vicinal.detr import Encoder, PointStem


@pytest.fixture
def model() -> tuple[PointStem, Encoder]:
    """In float64, with weights far from their initial ones."""
    stem, encoder = make_model()
    stir(stem)
    stir(encoder)
    return stem.double(), encoder.double()


def scene(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    events, polarities = moving_disks()
    return events, polarities.to(dtype)


def by_slices(stream: EventStream, events: Tensor, polarities: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates and values of all points, slice after slice."""
    coordinates, values = [], []
    for first in range(0, STEPS, stream.slice_steps):
        rows = (events[:, 1] >= first) & (events[:, 1] < first + stream.slice_steps)
        part = stream.step(move(events[rows], -first), polarities[rows])
        coordinates.append(move(part.coordinates, first - stream.reach))
        values.append(part.values)
    return torch.cat(coordinates), torch.cat(values)


@torch.no_grad()
def difference(
    model: tuple[PointStem, Encoder], stream: EventStream, events: Tensor, polarities: Tensor
) -> float:
    """The largest between slices and the whole, whose points must be the same."""
    stem, encoder = model
    whole = encoder(stem(events, polarities, (STEPS, *SENSOR), batch_size=1))
    coordinates, values = by_slices(stream, events, polarities)
    points, row = torch.cat((whole.coordinates, coordinates)).unique(dim=0, return_inverse=True)
    assert len(points) == len(whole) == len(coordinates)
    expected, ours = row.split(len(whole))
    return float((whole.values[expected.argsort()] - values[ours.argsort()]).abs().max())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_example_states_a_small_difference(
    dtype: torch.dtype, tolerance: float, capsys: pytest.CaptureFixture[str]
) -> None:
    stem, encoder = make_model()
    largest = compare(stem.to(dtype), encoder.to(dtype), *scene(dtype))
    assert 0 < largest <= tolerance
    assert f"{largest:.1e}" in capsys.readouterr().out


@pytest.mark.parametrize("slice_steps", [4, 16, 32])
def test_slices_of_other_lengths(model: tuple[PointStem, Encoder], slice_steps: int) -> None:
    assert difference(model, EventStream(*model, slice_steps), *scene()) <= 1e-12


def test_slices_without_events(model: tuple[PointStem, Encoder]) -> None:
    events, polarities = scene()
    rows = (events[:, 1] >= 20) & ((events[:, 1] < 61) | (events[:, 1] >= 83))
    assert difference(model, EventStream(*model), events[rows], polarities[rows]) <= 1e-12


def test_what_is_kept_is_needed(model: tuple[PointStem, Encoder]) -> None:
    stream = EventStream(*model)
    stream.reach -= 4
    assert difference(model, stream, *scene()) > 1e-6


def test_what_is_kept_does_not_grow(model: tuple[PointStem, Encoder]) -> None:
    events, polarities = scene()
    rows = (events[:, 1] >= 8) & (events[:, 1] < 16)
    stream, kept = EventStream(*model), []
    for _ in range(6):
        stream.step(move(events[rows], -8), polarities[rows])
        assert times(stream.points).min() >= 0
        assert times(stream.points).max() < stream.reach
        kept.append((len(stream.events), len(stream.points), [len(x) for x in stream.inputs]))
    assert kept[2:] == kept[1:-1]
    assert 0 < kept[-1][0] <= rows.sum() * stream.reach // 8


@pytest.mark.parametrize("example", [stream_events, classify_points])
def test_the_commands_of_examples_show_their_help(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [example.__name__, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        example.main()
    assert f"usage: python -m {example.__name__}" in capsys.readouterr().out
