"""Scenes of labeled points, how labels are measured and drawn, and nets without attention."""

import math
from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex
from test_digits_scenes import strokes

from examples.digits.scenes import Scenes
from examples.labels import hits
from examples.labels.evaluation import confusion, quality
from examples.labels.hits import BANDS, FIELD, MAX_RAPIDITY, RADII, SHAPE, Events, simulate
from examples.labels.model import ATTENTIONS, PointLabeler, count_parameters
from examples.labels.picture import OTHER, WRONG, draw_labels
from examples.labels.scenes import FRAGMENT, LabeledCanvases, LabeledPoints, Panel, pixel_labels
from examples.labels.tasks import TASKS


def test_intersection_over_union_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 2, 2])
    counts = confusion(labels, predicted, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    result = quality(counts)
    # Class 0: 2 of 3; class 1: 1 of 3; class 2: 1 of 2; class 3 occurs nowhere.
    assert result.ious[:3] == pytest.approx([2 / 3, 1 / 3, 1 / 2])
    assert math.isnan(result.ious[3])
    assert result.miou == pytest.approx((2 / 3 + 1 / 3 + 1 / 2) / 3)
    assert result.accuracy == pytest.approx(4 / 6)


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    result = quality(confusion(torch.tensor([0, 0]), torch.tensor([0, 1]), 2))
    assert result.ious == [0.5, 0.0]
    assert result.miou == 0.25


def test_pixels_have_the_label_of_their_digit() -> None:
    scene = Scenes(strokes(), seed=3).scene(0)
    labels = pixel_labels(scene)
    for cell, label in zip(scene.cells.tolist(), labels.tolist(), strict=True):
        around = [
            digit
            for (row, column, height, width), digit in zip(
                scene.boxes.tolist(), scene.labels.tolist(), strict=True
            )
            if abs(cell[0] + 0.5 - row) < height / 2 and abs(cell[1] + 0.5 - column) < width / 2
        ]
        assert around == ([] if label == FRAGMENT else [label])
    assert set(labels.tolist()) >= {FRAGMENT, *scene.labels.tolist()}


def test_batches_hold_the_canvases_one_after_another() -> None:
    scenes = Scenes(strokes(), seed=3)
    batch = LabeledCanvases(scenes).batch(range(2)).to("cpu", torch.float64)
    assert (batch.batch_size, batch.n_points) == (2, len(batch.coordinates))
    assert batch.values.dtype == torch.float64
    for number in range(2):
        own, scene = batch.coordinates[:, 0] == number, scenes.scene(number)
        assert torch.equal(batch.coordinates[own, 1:], scene.cells)
        assert torch.equal(batch.labels[own], pixel_labels(scene))


def test_hits_lie_in_the_grid_and_depend_on_seed_and_number_alone() -> None:
    batch = Events(4000, seed=1, same_size=True).batch(range(2))
    assert 0.9 * 8000 < batch.n_points <= 8000
    cells = batch.coordinates[:, 1:]
    assert (cells >= 0).all()
    assert (cells < torch.tensor(SHAPE)).all()
    assert torch.equal(batch.values[:, 0], torch.tensor(RADII)[cells[:, 0]])
    assert (batch.values[:, 1:].abs() <= 0.5).all()
    share = (batch.labels == hits.NOISE).double().mean()
    assert 0.08 < share < 0.12
    again = Events(4000, seed=1, same_size=True).event(1)
    assert torch.equal(again[0], cells[batch.coordinates[:, 0] == 1])
    assert not torch.equal(Events(4000, seed=2, same_size=True).event(1)[0][:9], again[0][:9])


def test_events_of_training_differ_in_size() -> None:
    sizes = [len(Events(4000, seed=0).event(number)[0]) for number in range(12)]
    assert 0.1 * 3500 < min(sizes) < max(sizes) <= 4000
    assert max(sizes) > 2 * min(sizes)


def test_a_track_is_a_circle_through_the_center() -> None:
    """Of the radius that its momentum gives; along the cylinder, a helix."""
    generator = torch.Generator().manual_seed(0)
    layer, azimuth, rapidity, momentum = hits._crossings(40, generator)
    assert momentum.unique().numel() == 40
    for p in momentum.unique():
        own = momentum == p
        r, circle = torch.tensor(RADII)[layer[own]].double(), float(p) / (0.3 * FIELD)
        turn = torch.asin(r / (2 * circle))
        bend = azimuth[own].double() - azimuth[own][0].double()
        expected = turn - turn[0]
        sign = -1.0 if bend[-1] < 0 else 1.0
        torch.testing.assert_close(bend, sign * expected, rtol=0, atol=1e-5)
        along = r * rapidity[own].double().sinh()  # straight in the length of the arc
        steps = along.diff() / (2 * circle * turn).diff()
        torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-3, atol=1e-3)
        assert len(r) == sum(radius < 2 * circle for radius in RADII)


def test_labels_of_hits_are_bands_of_momentum() -> None:
    generator = torch.Generator().manual_seed(0)
    cells, _, labels = simulate(20_000, generator)
    assert labels.unique().tolist() == [0, 1, 2, 3]
    reach = BANDS[0] / (0.3 * FIELD) * 2  # the largest radius that the lowest band can reach
    assert reach > max(RADII)
    counts = torch.bincount(cells[labels == 1, 0], minlength=len(RADII))
    assert counts[-1] < counts[0]  # the slowest particles turn back before
    counts = torch.bincount(cells[labels == 3, 0], minlength=len(RADII))
    assert counts[-1] > 0.9 * counts[0]
    assert MAX_RAPIDITY > 0


def small(task: str) -> Any:
    """A task with a net of a few parameters."""
    n_levels = len(TASKS[task].net["strides"])
    sizes = {"embed_dims": (16,) * n_levels, "n_heads": (2,) * n_levels, "depths": (1,) * n_levels}
    return TASKS[task]._replace(net=TASKS[task].net | sizes)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(("data", "steps"), [("digits", 12), ("hits", 30)])
def test_losses_fall_on_scenes_that_are_always_the_same(
    data: str, steps: int, attention: str
) -> None:
    torch.manual_seed(0)
    if data == "digits":
        batch = LabeledCanvases(Scenes(strokes(), seed=0)).batch(range(1))
    else:
        batch = Events(300, seed=0, same_size=True).batch(range(1))
    model = PointLabeler(small(data), attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        (loss,) = model(batch).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    predicted = model.predict(batch)
    assert predicted.shape == batch.labels.shape
    assert (predicted < len(model.task.classes)).all()


@pytest.mark.parametrize("data", ["digits", "hits"])
def test_nets_without_attention_have_as_many_parameters(data: str) -> None:
    counts = {name: count_parameters(PointLabeler(TASKS[data], name)) for name in ATTENTIONS}
    for name in ("pooling", "stem"):
        assert 0.85 < counts[name] / counts["neighborhood"] < 1.05, counts


def test_pictures_show_true_labels_predicted_ones_and_errors() -> None:
    x, labels = torch.arange(4.0), torch.tensor([0, 1, 2, 2])
    panel = Panel(x, 2 * x, labels, torch.tensor([0, 1, 2, 0]), "scene 7")
    figure = draw_labels([panel, panel], ("a", "b", "none"), other=2)
    assert len(figure.axes) == 4
    left, right, *_ = axes = figure.axes
    drawn: list[list[Any]] = [list(ax.collections) for ax in axes]
    (points,) = drawn[0]
    assert points.get_offsets().tolist() == [[0, 0], [1, 2], [2, 4], [3, 6]]
    colors = [to_hex(color) for color in points.get_facecolor()]
    assert len(set(colors)) == 3
    assert colors[2] == colors[3] == OTHER
    wrong, predicted = drawn[1]
    assert to_hex(predicted.get_facecolor()[3]) == colors[0]
    assert wrong.get_offsets().tolist() == [[3, 6]]
    assert to_hex(wrong.get_facecolor()[0]) == WRONG
    assert "scene 7" in left.get_title()
    assert "75.0%" in right.get_title()


def test_a_panel_of_an_event_shows_a_wedge_along_the_cylinder() -> None:
    batch = Events(4000, seed=0, same_size=True).batch(range(2))
    panel = TASKS["hits"].draw(batch, batch.labels, 1)
    assert 0 < len(panel.x) < 0.3 * batch.n_points / 2
    radius = torch.stack((panel.x, panel.y)).norm(dim=0)
    nearest = (radius[:, None] - torch.tensor(RADII)).abs().amin(1)
    assert nearest.max() < 1e-5


def test_labeled_points_may_be_none() -> None:
    empty = LabeledPoints(
        torch.empty(0, 3, dtype=torch.int64),
        torch.empty(0, 1),
        torch.empty(0, dtype=torch.int64),
        1,
    )
    model = PointLabeler(small("digits"))
    assert model.predict(empty).shape == (0,)
    (loss,) = model(empty).values()
    assert loss.isfinite()
