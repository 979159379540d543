"""Canvases of handwriting: their digits and fragments, and that a run always gets the same ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.canvas import GAP, Digits, place_boxes
from examples.digits import scenes as module
from examples.digits.scenes import (
    DIGIT_SIDES,
    DIGITS,
    MIN_INK,
    SIZE,
    Batch,
    Scene,
    Scenes,
    collate,
    split_digits,
)

N_SCENES = 12


def strokes(n: int = 60, seed: int = 0) -> Digits:
    """Stand-ins for handwriting: a rectangle of its own ink and shape each, with a blank edge."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(n, 28, 28)
    first = torch.randint(4, 8, (n, 2), generator=generator)
    last = torch.randint(16, 24, (n, 2), generator=generator)
    for image, (top, left), (bottom, right) in zip(
        images, first.tolist(), last.tolist(), strict=True
    ):
        image[top:bottom, left:right] = torch.rand(
            bottom - top, right - left, generator=generator
        ).clamp(min=0.5)
    return Digits(images, torch.arange(n) % 10)


@pytest.fixture(scope="module")
def canvases() -> list[Scene]:
    run = Scenes(strokes(), seed=3)
    return [run.scene(number) for number in range(N_SCENES)]


def low_and_high(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2


def ink_map(scene: Scene) -> Tensor:
    canvas = torch.zeros(SIZE, SIZE)
    canvas[tuple(scene.cells.t())] = scene.ink
    return canvas


def test_points_are_distinct_cells_with_ink_on_the_canvas(canvases: list[Scene]) -> None:
    for scene in canvases:
        assert scene.cells.dtype == torch.int64
        assert len(torch.unique(scene.cells, dim=0)) == len(scene.cells) == len(scene.ink)
        assert scene.cells.min() >= 0
        assert scene.cells.max() < SIZE
        assert scene.ink.min() >= MIN_INK
        assert scene.ink.max() <= 1


def test_boxes_are_tight_around_the_ink(canvases: list[Scene]) -> None:
    for scene in canvases:
        assert DIGITS[0] <= len(scene.boxes) == len(scene.labels) <= DIGITS[1]
        for low, high in zip(*low_and_high(scene.boxes), strict=True):
            assert low.eq(low.round()).all()
            inside = scene.cells[((scene.cells >= low) & (scene.cells < high)).all(1)]
            assert torch.equal(inside.amin(0).float(), low)
            assert torch.equal(inside.amax(0).float() + 1, high)


def test_digits_keep_a_gap_and_fragments_stay_off_them(canvases: list[Scene]) -> None:
    for scene in canvases:
        low, high = low_and_high(scene.boxes)
        apart = (low[:, None] >= high + 2) | (low >= high[:, None] + 2)
        assert (apart.any(2) | torch.eye(len(low), dtype=torch.bool)).all()

        cells = scene.cells[:, None]
        inside = ((cells >= low) & (cells < high)).all(2)
        near = ((cells >= low - 2) & (cells < high + 2)).all(2)
        assert torch.equal(inside, near)
        assert (~inside.any(1)).any(), "no fragments"


def test_digits_are_images_enlarged_bilinearly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every box holds one of the images, as `interpolate` enlarges it to one of the sides."""
    monkeypatch.setattr(module, "DIGITS", (4, 4))
    digits = strokes(5)
    enlarged = [
        (label, F.interpolate(digits.images[label][None, None], side, mode="bilinear")[0, 0])
        for label in range(5)
        for side in ((a, a) for a in range(DIGIT_SIDES[0], DIGIT_SIDES[1] + 1))
    ]
    scene = Scenes(digits, seed=0).scene(0)
    canvas = ink_map(scene)
    for label, low, high in zip(scene.labels, *low_and_high(scene.boxes), strict=True):
        (top, left), (bottom, right) = low.int().tolist(), high.int().tolist()
        box = canvas[top:bottom, left:right]
        assert any(same_ink(box, image) for of, image in enlarged if of == label)


def same_ink(box: Tensor, image: Tensor) -> bool:
    rows, columns = (image >= MIN_INK).nonzero().unbind(1)
    strokes = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return strokes.shape == box.shape and torch.allclose(
        box, strokes * (strokes >= MIN_INK), atol=1e-5
    )


def test_a_canvas_depends_on_its_number_and_seed_alone() -> None:
    digits = strokes()
    together = Scenes(digits, 3).batch(range(4))
    torch.manual_seed(1)
    halves = [Scenes(digits, 3).batch(numbers) for numbers in ((0, 1), (2, 3))]
    assert torch.equal(together.ink, torch.cat([half.ink for half in halves]))
    assert torch.equal(together.boxes, torch.cat([half.boxes for half in halves]))
    for other in (Scenes(digits, 3).scene(1), Scenes(digits, 4).scene(0)):
        assert not torch.equal(Scenes(digits, 3).scene(0).boxes, other.boxes)


def test_seeds_beyond_32_bits_differ() -> None:
    digits = strokes()
    assert not torch.equal(Scenes(digits, 0).scene(0).boxes, Scenes(digits, 2**32).scene(0).boxes)


def test_batches_hold_the_canvases_one_after_another(canvases: list[Scene]) -> None:
    empty = Scene(*(part[:0] for part in canvases[0]))
    batch = collate([canvases[0], empty, canvases[1]])
    assert batch.batch_size == 3
    assert batch.box_offsets.tolist() == [
        0,
        *(len(canvases[0].boxes),) * 2,
        len(canvases[0].boxes) + len(canvases[1].boxes),
    ]
    for image, scene in ((0, canvases[0]), (1, empty), (2, canvases[1])):
        points = batch.coordinates[:, 0] == image
        assert torch.equal(batch.coordinates[points, 1:], scene.cells)
        assert torch.equal(batch.ink[points], scene.ink)
        own = slice(*batch.box_offsets[image : image + 2].tolist())
        assert torch.equal(batch.boxes[own], scene.boxes)
        assert torch.equal(batch.labels[own], scene.labels)
    assert [part.dtype for part in batch.to("cpu", torch.float64)] == [
        torch.int64,
        torch.float64,
        torch.float64,
        torch.int64,
        torch.int64,
    ]
    assert isinstance(batch.to("cpu"), Batch)


def test_training_and_test_digits_are_disjoint_and_alike() -> None:
    digits = strokes(200)
    train, test = split_digits(digits)
    assert len(train.images) == 160
    assert torch.bincount(train.labels).tolist() == [16] * 10
    assert torch.bincount(test.labels).tolist() == [4] * 10
    both = torch.cat((train.images, test.images)).flatten(1)
    assert torch.equal(both.unique(dim=0), digits.images.flatten(1).unique(dim=0))


def test_a_full_canvas_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIZE", 60)
    with pytest.raises(ValueError, match="canvas"):
        Scenes(strokes(), 0).scene(0)


def test_boxes_lie_on_the_canvas_apart_from_each_other() -> None:
    extents = torch.tensor([[40, 3], [1, 20], [7, 7], [9, 1], [64, 2]])
    first, last = place_boxes(extents, 64, torch.Generator().manual_seed(0)).unbind(1)
    assert torch.equal(last - first, extents.float())
    assert first.min() >= 0
    assert last.max() <= 64
    for i in range(5):
        for j in range(i):
            assert ((first[i] >= last[j] + GAP) | (first[j] >= last[i] + GAP)).any()


def test_boxes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^extents: expected at most 10 cells, got 11"):
        place_boxes(torch.tensor([[11, 3]]), 10, torch.Generator())
    with pytest.raises(ValueError, match=r"no free position on the canvas after 1 boxes"):
        place_boxes(torch.tensor([[10, 10], [3, 3]]), 10, torch.Generator())
