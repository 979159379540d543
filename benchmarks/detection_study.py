"""Why a detector's boxes are as tight as they are: ``python -m benchmarks.detection_study``.

Trains variants of the demo's detector, each on the same canvases, and prints for each the average
precision, the mean IoU of the digits that it finds, the average precision that the boxes before
each layer of the decoder would have had, and the processor time of a step. Short runs tell boxes
apart by the mean IoU: how many digits are found (AP50) differs more between seeds than between
variants.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.baselines.box_relative import BoxRelativeAttention
from benchmarks.report import table
from examples.canvas import load_digits
from examples.detect_digits import BETAS, TEST_CANVASES, TEST_SEED
from examples.digits import model as demo
from examples.digits.evaluation import average_precision
from examples.digits.model import DigitDetector
from examples.digits.scenes import Batch, Scenes, split_digits
from examples.training.loop import Config, train
from vicinal import SparseDeformableAttention, SparseNeighborhoodAttentionBlock
from vicinal.detr import (
    DecoderLayer,
    DetectionLoss,
    Detections,
    SetCriterion,
    pairwise_iou,
    select_detections,
)

MIN_SCORE, MIN_IOU = 0.3, 0.5  # of the detection of a digit that is found
MEAN_SIZE = 20.0  # of a digit's box, in cells of the finest level


@dataclass(frozen=True)
class Variant:
    """A difference to the demo.

    Attributes:
        change: of the new model.
        constants: other values of constants of `examples.digits.model`, by name.
        batch: canvases of a step.
        betas: of AdamW.
        rate: returns the parameters with another learning rate, and its ratio to the others'.
    """

    change: Callable[[DigitDetector], None] = lambda model: None
    constants: dict[str, Any] = field(default_factory=dict)
    batch: int = 2
    betas: tuple[float, float] = BETAS
    rate: Callable[[DigitDetector], tuple[Iterable[nn.Parameter], float]] = lambda model: ((), 1.0)


class TwoRateAdamW(torch.optim.AdamW):
    """AdamW with another learning rate of some parameters, ``ratio`` times that of the others."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        ratio: float,
        groups: Iterable[dict[str, Any]],
        **options: Any,
    ) -> None:
        own = set(parameters)
        parts = [
            {**group, "params": [p for p in group["params"] if (p in own) == inside], "ratio": part}
            for group in groups
            for inside, part in ((True, ratio), (False, 1.0))
        ]
        super().__init__(parts, **options)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:  # the loop sets the rate of all groups before every step
            group["lr"] *= group["ratio"]
        return super().step(closure)


class Result(NamedTuple):
    """What a trained variant gives."""

    ap50: float
    ap75: float
    ap: float
    mean_iou: float
    stages: list[float]  # AP with the boxes of the query selection and of each layer
    seconds: float  # of processor time per step
    loss: float  # mean of the last 30 steps


def deformable() -> SparseDeformableAttention:
    sizes = demo.EMBED_DIM, demo.HEADS, len(demo.STRIDES)
    return SparseDeformableAttention(*sizes, demo.SAMPLES)


def replace(
    model: DigitDetector,
    *,
    encoder: Callable[[], nn.Module] | None = None,
    decoder: Callable[[], nn.Module] | None = None,
) -> None:
    """Replaces the attentions of encoder or decoder."""
    if encoder is not None:
        for layer in model.detector.encoder.layers:
            layer.attention = encoder()
    if decoder is not None:
        for layer in model.detector.decoder.layers:
            layer.cross_attention = decoder()


def box_relative(model: DigitDetector) -> None:
    for layer in model.detector.decoder.layers:
        assert isinstance(layer, DecoderLayer)
        layer.cross_attention = BoxRelativeAttention(layer, MEAN_SIZE)


def with_quality(model: DigitDetector) -> None:
    model.loss = SetCriterion(loss=DetectionLoss(quality=True), candidate_loss=DetectionLoss())


def blocks(model: DigitDetector) -> list[SparseNeighborhoodAttentionBlock]:
    return [x for x in model.modules() if isinstance(x, SparseNeighborhoodAttentionBlock)]


def without_rotated_values(model: DigitDetector) -> None:
    for block in blocks(model):
        block.rotary_values = False


def without_ramps(model: DigitDetector) -> None:
    for block in blocks(model):
        nn.init.zeros_(block.get_parameter("relative_bias"))


def random_directions(model: DigitDetector) -> None:
    for block in blocks(model):
        block.pos_encoding.reset_parameters()


def at_centers(model: DigitDetector) -> None:
    for layer in model.detector.decoder.layers:
        assert isinstance(layer, DecoderLayer)
        layer.reference_points = None


def with_activation(activation: type[nn.Module], model: DigitDetector) -> None:
    """Replaces every GELU."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GELU):
                setattr(module, name, activation())


def looking_forward_once(model: DigitDetector) -> None:
    model.detector.decoder.look_forward_twice = False


def slow_encoder(model: DigitDetector) -> tuple[Iterable[nn.Parameter], float]:
    return (*model.stem.parameters(), *model.detector.encoder.parameters()), 0.5


def slow_frequencies(model: DigitDetector) -> tuple[Iterable[nn.Parameter], float]:
    """Deformable DETR trains its sampling offsets so."""
    return (p for block in blocks(model) for p in block.pos_encoding.parameters()), 0.1


VARIANTS: dict[str, Variant] = {
    "the demo": Variant(),
    "4 canvases a step": Variant(batch=4),
    "all points are queries of the encoder": Variant(constants={"QUERY_LEVELS": None}),
    "object queries at centers alone": Variant(at_centers),
    "at centers, windows of 17, 13, 9, 5 cells": Variant(
        at_centers, constants={"DECODER_WINDOWS": (17, 13, 9, 5)}
    ),
    "windows of 5 x 5 in the decoder": Variant(constants={"DECODER_WINDOWS": (5, 5, 5, 5)}),
    "windows up to 25 x 25 in the decoder": Variant(constants={"DECODER_WINDOWS": (25, 13, 7, 5)}),
    "windows of 9, 7, 7, 5 cells in the encoder": Variant(
        constants={"ENCODER_WINDOWS": (9, 7, 7, 5)}
    ),
    "frequencies in the decoder relative to boxes": Variant(box_relative),
    "values not rotated": Variant(without_rotated_values),
    "relative bias zero at first": Variant(without_ramps),
    "frequencies in random directions": Variant(random_directions),
    "100 object queries in evaluation too": Variant(constants={"EVAL_QUERIES": None}),
    "deformable decoder": Variant(lambda model: replace(model, decoder=deformable)),
    "deformable encoder": Variant(lambda model: replace(model, encoder=deformable)),
    "deformable": Variant(lambda model: replace(model, encoder=deformable, decoder=deformable)),
    "IoU as the target score": Variant(with_quality),
    "3 encoder layers": Variant(constants={"ENCODER_LAYERS": 3}),
    "3 decoder layers": Variant(constants={"DECODER_LAYERS": 3}),
    "AdamW with betas of 0.9 and 0.999": Variant(betas=(0.9, 0.999)),
    "looking forward once": Variant(looking_forward_once),
    "half the learning rate in stem and encoder": Variant(rate=slow_encoder),
    "a tenth of the learning rate of rotary frequencies": Variant(rate=slow_frequencies),
    "ReLU": Variant(partial(with_activation, nn.ReLU)),
    "SiLU": Variant(partial(with_activation, nn.SiLU)),
}


def run(variant: Variant, canvases: int, tests: int, seed: int) -> Result:
    """Trains a variant on so many canvases, and tests it on others."""
    for_training, for_test = split_digits(load_digits())
    torch.manual_seed(seed)
    with mock.patch.dict(vars(demo), variant.constants):
        model = DigitDetector()
    variant.change(model)
    config = Config(canvases // variant.batch, variant.batch, seed, betas=variant.betas)
    optimizer = partial(TwoRateAdamW, *variant.rate(model))
    start = time.process_time()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(torch.optim, "AdamW", optimizer),
    ):
        losses = train(
            model.train(), Scenes(for_training, seed).batch, config, Path(folder), save_every=10**9
        ).losses
    seconds = (time.process_time() - start) / config.steps
    last = [sum(loss.values()) for loss in losses[-30:]]
    scenes = Scenes(for_test, TEST_SEED)
    batches = [scenes.batch([number]) for number in range(tests)]
    found = [detections_by_stage(model.eval(), batch) for batch in batches]
    *stages, final = [average_precision(stage, batches) for stage in zip(*found, strict=True)]
    overlaps = torch.cat(
        [best_overlaps(x[-1], batch) for x, batch in zip(found, batches, strict=True)]
    )
    return Result(
        ap50=final.ap50,
        ap75=final.ap75,
        ap=final.ap,
        mean_iou=overlaps.mean().item(),
        stages=[stage.ap for stage in stages],
        seconds=seconds,
        loss=sum(last) / len(last),
    )


@torch.no_grad()
def detections_by_stage(model: DigitDetector, batch: Batch) -> list[Detections]:
    """Detections with the final scores, and the boxes before each layer and after the last."""
    output = model.detect(batch)
    final = output.layers[-1]
    boxes = [output.selection.queries.boxes, *(layer.boxes for layer in output.layers)]
    found = [select_detections(final._replace(boxes=of_stage)) for of_stage in boxes]
    return [stage._replace(boxes=stage.boxes * demo.STRIDES[0]) for stage in found]


def best_overlaps(found: Detections, batch: Batch) -> Tensor:
    """The IoU of each digit of one canvas that is found, with its best detection."""
    right = found.labels[:, None] == batch.labels
    overlaps = pairwise_iou(found.boxes, batch.boxes) * right * (found.scores > MIN_SCORE)[:, None]
    best = overlaps.amax(0)
    return best[best >= MIN_IOU]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection_study")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--canvases", type=int, default=1000, help="to train on")
    parser.add_argument("--tests", type=int, default=TEST_CANVASES, help="canvases to test on")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    arguments = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    for name in arguments.variants:
        for seed in arguments.seeds:
            result = run(VARIANTS[name], arguments.canvases, arguments.tests, seed)
            figures = (f"{x:.3f}" for x in result[:4])
            stages = ", ".join(f"{x:.3f}" for x in result.stages)
            times = f"{result.seconds:.2f}", f"{result.loss:.2f}"
            rows.append((name, str(seed), *figures, stages, *times))
            print(*rows[-1], sep=" | ", flush=True)
    header = ("", "seed", "AP50", "AP75", "AP", "mean IoU", "AP before each layer", "CPU s", "loss")
    print(table(header, rows))


if __name__ == "__main__":
    main()
