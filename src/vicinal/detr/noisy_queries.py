"""Queries that start from objects with noise, which need no matching (Li et al. 2022, DN-DETR)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.checks import refuse
from .._utils.random import uniform_from_hash
from .matching import Matches
from .targets import Targets, check_targets


class DenoisingQueries(NamedTuple):
    """Noisy copies of every object; image by image, and in an image group by group.

    Attributes:
        boxes: ``[D, 2P]``, the objects' boxes with noise.
        labels: int64 ``[D]``, the objects' classes, some of them changed: to be embedded.
        target: int64 ``[D]``, the row of the targets that each is to find.
        group: int64 ``[D]``, from 0: queries of different groups are not to see each other.
        offsets: int64 ``[B + 1]``: image ``b`` owns the rows ``offsets[b]:offsets[b + 1]``.
    """

    boxes: Tensor
    labels: Tensor
    target: Tensor
    group: Tensor
    offsets: Tensor

    @property
    def matches(self) -> Matches:
        """Every query with its target: what `DetectionLoss` takes for predictions made of them."""
        return Matches(torch.arange(len(self.target), device=self.target.device), self.target)


def noisy_queries(
    targets: Targets,
    n_groups: int,
    *,
    label_noise: float = 0.2,
    box_noise: float = 0.4,
    n_classes: int,
    generator: torch.Generator | None = None,
) -> DenoisingQueries:
    """``n_groups`` noisy copies of every object, to be turned back into the object by a decoder.

    A centre moves by up to ``box_noise / 2`` of the object's size, so that it stays inside the
    box, and a size is multiplied by up to ``1 ± box_noise``, each axis apart and uniformly.

    Args:
        targets: the objects.
        n_groups: number of copies; 0 for none.
        label_noise: how often a label is changed to another class, in [0, 1].
        box_noise: in [0, 1).
        n_classes: number of classes, C.
        generator: what the seed of the noise is drawn from; None: PyTorch's own.

    Returns:
        ``D = n_groups * M`` queries.

    Raises:
        ValueError: targets that cannot be (`check_targets`), rates outside their range.
    """
    _check(targets, n_groups, label_noise, box_noise, n_classes)
    boxes, labels, offsets = targets.boxes, targets.labels.long(), targets.offsets.long()
    device, n_rows = boxes.device, n_groups * len(labels)
    noise_device = device if generator is None else generator.device

    counts = offsets.diff()
    image = torch.repeat_interleave(counts * n_groups, output_size=n_rows)
    place = torch.arange(n_rows, device=device) - n_groups * offsets[image]
    group = place // counts[image]
    target = offsets[image] + place % counts[image]

    seed = torch.randint(2**62, (), generator=generator, device=noise_device).to(device)
    noise = _noise(seed, boxes[target], labels[target], group)
    # Centres take half as much as sizes: half the noise is half the box.
    shift, growth = (box_noise * (2 * noise[:, :-2] - 1)).to(boxes).chunk(2, 1)
    center, size = boxes[target].chunk(2, 1)
    noisy = torch.cat((center + shift * size / 2, size * (1 + growth)), 1)

    step = (noise[:, -1] * max(n_classes - 1, 1)).long() + 1
    step = torch.where(noise[:, -2] < label_noise, step, 0)
    return DenoisingQueries(
        noisy, (labels[target] + step) % n_classes, target, group, offsets * n_groups
    )


def _noise(seed: Tensor, boxes: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """``[D, 2P + 2]``, uniform in [0, 1), of objects ``[D]`` in groups ``[D]``.

    It follows from the seed, the object and its group alone, so it does not matter which objects
    share a batch: processes that share one and draw the same seed make the noise of one process.
    """
    bits = boxes.float().view(torch.int32).long()
    columns = torch.arange(boxes.shape[1] + 2, device=boxes.device)
    about = (*bits.unbind(1), labels, group)
    return uniform_from_hash(seed, [*(number[:, None] for number in about), columns])


def _check(
    targets: Targets, n_groups: int, label_noise: float, box_noise: float, n_classes: int
) -> None:
    for name, number, least in (("n_groups", n_groups, 0), ("n_classes", n_classes, 1)):
        if not isinstance(number, int) or number < least:
            refuse(name, f"an integer of at least {least}", number)
    if not isinstance(label_noise, int | float) or not 0 <= label_noise <= 1:
        refuse("label_noise", "a rate in [0, 1]", label_noise)
    if not isinstance(box_noise, int | float) or not 0 <= box_noise < 1:
        refuse("box_noise", "a rate in [0, 1)", box_noise)
    check_targets(targets, None, n_classes, None)
