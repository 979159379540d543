"""Canvases that several processes share: each owns the points in its part of space."""

from __future__ import annotations

from collections.abc import Callable

from torch.distributed import ProcessGroup, get_rank, get_world_size
from torch.distributed.device_mesh import init_device_mesh

from examples.digits.model import STRIDES, DigitDetector
from examples.digits.scenes import SIZE, Batch
from examples.training.processes import rank_and_world_size
from vicinal.distributed import partition_space, shard_attention


def divide(
    model: DigitDetector, batches: Callable[[range], Batch], space: int
) -> tuple[DigitDetector, Callable[[range], Batch]]:
    """Makes processes share canvases, ``space`` of them, of consecutive ranks.

    Args:
        model: the same on all processes. It is changed in place; its state dict stays the same.
        batches: generates the canvases with the given numbers.
        space: a divisor of the number of processes.

    Returns:
        the model, and what generates the own parts of canvases.
    """
    device = next(model.parameters()).device
    sizes = rank_and_world_size()[1] // space, space
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("data", "space"))
    group = mesh["space"].get_group()
    return shard_attention(model, group), lambda numbers: own_part(
        batches(numbers).to(device), group
    )


def own_part(batch: Batch, group: ProcessGroup) -> Batch:
    """The part of a batch that this process owns: all digits, but only the points in its part.

    Each process puts in its share of the points, so that none would need all of them; here every
    process can draw a whole canvas. The parts have about as many points each.

    Args:
        batch: the same canvases on all processes of the group.
        group: the processes that share them, all of which call this.
    """
    rank, n_parts = get_rank(group), get_world_size(group)
    coordinates, ink = (x.tensor_split(n_parts)[rank] for x in (batch.coordinates, batch.ink))
    part = partition_space(coordinates, (SIZE, SIZE), group, align=max(STRIDES))
    coordinates, ink = part.scatter(coordinates, ink)
    return batch._replace(coordinates=coordinates, ink=ink)
