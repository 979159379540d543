"""The detector of handwritten digits: stem, encoder and decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.digits.scenes import CLASSES, SIZE, Batch
from examples.directions import ring
from vicinal import SparseDeformableAttention, SparseNeighborhoodAttentionBlock
from vicinal.detr import (
    Decoder,
    DecoderLayer,
    DenoisingQueryGenerator,
    Detector,
    DetectorOutput,
    Encoder,
    EncoderLayer,
    FeedForward,
    PointStem,
    QuerySelection,
    QuerySelfAttention,
    ReferencePoints,
    SetCriterion,
    Targets,
)

EMBED_DIM = 128
HEADS = 8
STRIDES = (2, 4, 8, 16)
QUERY_LEVELS = (1, 2, 3)  # of the encoder; two thirds of all points are on level 0, keys alone
ENCODER_WINDOWS = (5, 5, 5, 5)
DECODER_WINDOWS = (9, 9, 7, 5)  # around the center and the sides of a box
OUTWARD = 3.0  # logit, at first, of a point at the border of a window in a head's direction
SAMPLES = 4  # of deformable attention, per head and level
ENCODER_LAYERS = 2
DECODER_LAYERS = 2
QUERIES = 100
EVAL_QUERIES = 150  # more than in training: candidates of large digits crowd out some small ones
CANDIDATE_LEVELS = (2, 3)
DENOISING_GROUPS = 3  # noisy copies of every digit


def make_neighborhood_attention(windows: tuple[int, ...]) -> SparseNeighborhoodAttentionBlock:
    """Makes an attention that is good at boxes.

    The outermost points of a digit determine its box, so each head at first prefers those that lie
    furthest in its direction, one of eight. Rotated values tell how far that is.
    """
    block = SparseNeighborhoodAttentionBlock(
        EMBED_DIM, HEADS, len(STRIDES), windows, bias=True, relative_bias=True, rotary_values=True
    )
    directions = ring(HEADS)
    axes = [torch.linspace(-1, 1, width) for width in windows]
    cells = torch.cat([torch.cartesian_prod(axis, axis) for axis in axes])
    with torch.no_grad():
        block.get_parameter("relative_bias").copy_(OUTWARD * cells @ directions.t())
    block.pos_encoding.set_directions(directions)
    return block


class DigitDetector(nn.Module):
    """Maps batches of canvases to losses or predictions.

    Args:
        attention: ``"neighborhood"`` or ``"deformable"``.
        checkpoint: recompute activations in the backward pass.
    """

    def __init__(self, attention: str = "neighborhood", checkpoint: bool = False) -> None:
        super().__init__()
        self.stem = PointStem(1, EMBED_DIM, STRIDES)

        def make_attention(windows: tuple[int, ...]) -> nn.Module:
            if attention == "deformable":
                return SparseDeformableAttention(EMBED_DIM, HEADS, len(STRIDES), SAMPLES)
            return make_neighborhood_attention(windows)

        def make_feed_forward() -> FeedForward:
            return FeedForward(EMBED_DIM, 2 * EMBED_DIM)

        encoder = Encoder(
            [
                EncoderLayer(make_attention(ENCODER_WINDOWS), make_feed_forward())
                for _ in range(ENCODER_LAYERS)
            ],
            EMBED_DIM,
            query_levels=QUERY_LEVELS,
            checkpoint=checkpoint,
        )
        selection = QuerySelection(
            EMBED_DIM, CLASSES, QUERIES, CANDIDATE_LEVELS, n_eval_queries=EVAL_QUERIES
        )
        decoder = Decoder(
            [
                DecoderLayer(
                    QuerySelfAttention(EMBED_DIM, HEADS),
                    make_attention(DECODER_WINDOWS),
                    make_feed_forward(),
                    reference_points=ReferencePoints(EMBED_DIM),
                )
                for _ in range(DECODER_LAYERS)
            ],
            EMBED_DIM,
            CLASSES,
            checkpoint=checkpoint,
        )
        denoiser = DenoisingQueryGenerator(EMBED_DIM, CLASSES, DENOISING_GROUPS)
        self.detector = Detector(encoder, selection, decoder, denoiser)
        self.loss = SetCriterion()

    def detect(self, batch: Batch, targets: Targets | None = None) -> DetectorOutput:
        """Predicts digits; boxes are in cells of the finest level."""
        pyramid = self.stem(batch.coordinates, batch.ink[:, None], (SIZE, SIZE), batch.batch_size)
        output: DetectorOutput = self.detector(pyramid, targets)
        return output

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the training losses by name."""
        targets = Targets(batch.boxes / STRIDES[0], batch.labels, batch.box_offsets)
        losses: dict[str, Tensor] = self.loss(self.detect(batch, targets), targets)
        return losses
