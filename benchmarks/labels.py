"""Compares networks that label points: ``python -m benchmarks.labels --data digits|hits``.

All have about as many parameters as `PointUNet`, and train for the same time on the same scenes:
some steps are timed, in turn, then each network trains for as many as fit into ``--seconds``, from
new parameters, with the learning rate of `PointUNet`. Times are processor times of one thread,
which other load on the machine changes little. The mean intersection over union (mIoU) is that of
scenes that a network was not trained on. Besides the networks of `examples.label_points`:

``spconv``: a U-Net of submanifold convolutions. ``azimuth``, for hits: `PointUNet` whose attention
is to 512 hits in the order of azimuth; ``azimuth_equal_pairs``: to as many hits as lie in the
windows of neighborhood attention.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.baselines.azimuth import AzimuthAttention
from benchmarks.baselines.submanifold import SubmanifoldUNet
from benchmarks.report import table
from examples.labels.evaluation import Quality, confusion, quality
from examples.labels.model import ATTENTIONS, PointLabeler, count_parameters
from examples.labels.scenes import Batches
from examples.labels.tasks import TASKS, Options, Task
from examples.training.loop import Config, train
from vicinal.nets import PointUNet

WARM_UPS, TIMED = 3, 7  # steps


class Result(NamedTuple):
    """One run.

    Attributes:
        seconds: of processor time per step, the median of a few.
        steps: of training.
        trained: processor time of these steps, in seconds.
    """

    network: str
    seed: int
    parameters: int
    seconds: float
    steps: int
    trained: float
    miou: float
    accuracy: float


def spconv_net(task: Task) -> nn.Module:
    """The widest `SubmanifoldUNet` of no more parameters than `PointUNet`."""
    strides = PointUNet(task.channels, len(task.classes), **task.net).strides
    dims, depths = task.net["embed_dims"], task.net["depths"]
    if max(strides[0]) > 1:  # the stem sees the finest cells
        finest = (1,) * len(strides[0])
        strides, dims, depths = (finest, *strides), (dims[0], *dims), (0, *depths)

    def scaled(share: int) -> SubmanifoldUNet:
        widths = [max(width * share // 64, 4) for width in dims]
        return SubmanifoldUNet(task.channels, len(task.classes), widths, strides, depths)

    most, share = count_parameters(PointLabeler(task)), 1
    with torch.device("meta"):
        while count_parameters(scaled(share + 1)) <= most:
            share += 1
    return scaled(share)


def azimuth_net(task: Task, equal_pairs: bool) -> nn.Module:
    """`PointUNet` with attention in the order of the periodic axis."""
    net, (axis,) = task.net, task.periodic_axes
    position_dim = net.get("position_dim", 2)

    def make_attention(level: int) -> nn.Module:
        width, heads = net["embed_dims"][level], net["n_heads"][level]
        window = net["neighborhood_sizes"][level] if equal_pairs else 512
        return AzimuthAttention(width, heads, axis, position_dim, window)

    return PointUNet(task.channels, len(task.classes), **net, make_attention=make_attention)


BASELINES: dict[str, Callable[[Task], nn.Module]] = {
    "spconv": spconv_net,
    "azimuth": functools.partial(azimuth_net, equal_pairs=False),
    "azimuth_equal_pairs": functools.partial(azimuth_net, equal_pairs=True),
}


def make_model(task: Task, network: str, seed: int) -> PointLabeler:
    """A network with random parameters that follow from the seed."""
    torch.manual_seed(seed)
    if network in ATTENTIONS:
        return PointLabeler(task, network)
    model = PointLabeler(task)
    model.net = BASELINES[network](task)
    return model


def networks_for(task: Task) -> list[str]:
    """Those that a task can be learned by: windows along azimuth need a periodic axis."""
    return [
        name for name in (*ATTENTIONS, *BASELINES) if "azimuth" not in name or task.periodic_axes
    ]


def seconds_of_a_step(models: list[PointLabeler], batches: Batches, batch: int) -> list[float]:
    """The median processor time to generate a batch and to train on it, for each of the models.

    They take turns, so that other load on the machine slows all of them.
    """
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    for step in range(WARM_UPS + TIMED):
        for model, optimizer, times in zip(models, optimizers, seconds, strict=True):
            start = time.process_time()
            (loss,) = model.train()(batches(range(step * batch, (step + 1) * batch))).values()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append(time.process_time() - start)
    return [median(times[WARM_UPS:]) for times in seconds]


def test(model: PointLabeler, batches: Batches, n_scenes: int) -> Quality:
    """The quality on scenes that were not trained on."""
    n_classes = len(model.task.classes)
    counts = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    for scene in range(n_scenes):
        batch = batches(range(scene, scene + 1))
        counts += confusion(batch.labels, model.predict(batch), n_classes)
    return quality(counts)


def study(arguments: argparse.Namespace) -> Iterator[Result]:
    """Trains and tests each network with each seed, one after another."""
    for seed in arguments.seeds:
        template = TASKS[arguments.data]
        task, for_training, for_test = template.open(template, Options(seed, arguments.hits))
        networks = arguments.networks or networks_for(task)
        timed = (make_model(task, network, seed) for network in networks)
        times = seconds_of_a_step([*timed], for_training, task.batch)
        for network, seconds in zip(networks, times, strict=True):
            steps = max(round(arguments.seconds / seconds), 1)
            model = make_model(task, network, seed)
            config = Config(steps, task.batch, seed, learning_rate=task.learning_rate)
            folder = arguments.out / f"{arguments.data}-{network}-{seed}"
            start = time.process_time()
            train(model.train(), for_training, config, folder, save_every=steps)
            trained = time.process_time() - start
            found = test(model, for_test, arguments.tests or task.n_tests)
            size = count_parameters(model)
            yield Result(network, seed, size, seconds, steps, trained, found.miou, found.accuracy)


def report(results: list[Result]) -> str:
    """A table of all runs."""
    rows = [
        (
            *(run.network, str(run.seed), f"{run.parameters:,}", f"{run.seconds:.2f}"),
            *(str(run.steps), f"{run.trained:.0f}", f"{run.miou:.3f}", f"{run.accuracy:.3f}"),
        )
        for run in results
    ]
    names = "network", "seed", "parameters", "s a step", "steps", "trained, s", "mIoU", "accuracy"
    return table(names, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.labels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", choices=("digits", "hits"), default="digits")
    parser.add_argument("--networks", nargs="*", choices=(*ATTENTIONS, *BASELINES))
    parser.add_argument("--seconds", type=float, default=300.0, help="to train; default: 300")
    parser.add_argument("--hits", type=int, default=60_000, help="of the largest event")
    parser.add_argument("--tests", type=int, help="test scenes; default: those of the data")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--out", type=Path, default=Path("out/labels-study"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Result] = []
    for result in study(arguments):
        results.append(result)
        print(report(results[-1:]), flush=True)
        runs = [run._asdict() for run in results]
        (arguments.out / f"{arguments.data}.json").write_text(json.dumps(runs, indent=1) + "\n")
    print(report(results))


if __name__ == "__main__":
    main()
