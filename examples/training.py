"""Teaches the encoder to tell which digit every stroke pixel is part of."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.canvas import Canvas, Digits, draw
from examples.encoder import Encoder, make_plan

# Small canvases, many steps; just as crowded as 200 digits on 512 x 512 cells.
DIGITS, SIZE = 16, 160
LEARNING_RATE = 2e-3
MAX_GRADIENT = 1.0


class Score(NamedTuple):
    """How well an encoder reads a canvas."""

    loss: float
    """Mean cross-entropy over the stroke pixels."""
    pixels: float
    """Share of the stroke pixels given the right digit."""
    digits: float
    """Share of the digits whose pixels together give the right one."""


def train(encoder: Encoder, digits: Digits, n_steps: int, generator: torch.Generator) -> None:
    """Takes ``n_steps`` optimisation steps, each on a canvas of its own, and shows how it goes."""
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(encoder.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=n_steps, pct_start=0.1
    )
    n_points, start = 0, time.perf_counter()
    with tqdm(range(n_steps), desc="Training", unit="step", leave=True) as progress:
        for _ in progress:
            canvas = draw(digits, DIGITS, SIZE, generator)
            pyramid = encoder.embed(canvas)
            logits = encoder(pyramid, make_plan(pyramid))
            loss = F.cross_entropy(logits, canvas.at_ink(canvas.labels))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(encoder.parameters(), MAX_GRADIENT)
            optimizer.step()
            schedule.step()

            n_points += len(pyramid)
            speed = n_points / (time.perf_counter() - start)
            progress.set_postfix_str(f"loss {loss.item():.2f}, {speed:,.0f} points/s")


def score(logits: Tensor, canvas: Canvas) -> Score:
    """Of the ``logits`` ``[n, 10]`` that the canvas's stroke pixels got, row by row."""
    labels, numbers = canvas.at_ink(canvas.labels), canvas.at_ink(canvas.numbers)
    pixels = logits.argmax(1) == labels
    n_digits = int(numbers.max()) + 1
    votes = logits.new_zeros(n_digits, 10).index_add_(0, numbers, logits.log_softmax(1))
    truth = labels.new_zeros(n_digits).index_copy_(0, numbers, labels)
    return Score(
        F.cross_entropy(logits, labels).item(),
        pixels.float().mean().item(),
        (votes.argmax(1) == truth).float().mean().item(),
    )
