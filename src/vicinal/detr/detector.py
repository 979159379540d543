"""A detector: encoder, selection of queries, decoder."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._utils.checks import check_counts, check_finite, reads_contents, refuse
from .._utils.ragged import batch_ids
from ..pyramid import FeaturePyramid
from ..windows import coordinate_dtype
from .decoder import Decoder
from .denoising import Denoiser
from .encoder import Encoder
from .matching import Matches
from .queries import ObjectQueries, best_per_image
from .selection import QuerySelection, Selection
from .targets import Predictions, Targets, check_predictions


class Denoised(NamedTuple):
    """What became of the denoising queries of a `Denoiser`.

    Attributes:
        layers: each decoder layer's predictions.
        matches: which object each was to find.
    """

    layers: list[Predictions]
    matches: Matches


class DetectorOutput(NamedTuple):
    """What a `Detector` makes of a batch of images.

    Attributes:
        pyramid: the encoder's points, which the queries looked at.
        selection: the points that became queries, and what was predicted at all candidates.
        layers: each decoder layer's predictions, the last the best.
        queries: the object queries that each decoder layer was given, for looking; denoising ones
            are among them.
        denoised: of the denoising queries, or None.
    """

    pyramid: FeaturePyramid
    selection: Selection
    layers: list[Predictions]
    queries: list[ObjectQueries]
    denoised: Denoised | None = None


class Detections(NamedTuple):
    """Objects found, image by image, surest first.

    Attributes:
        boxes: ``[K, 2P]``, centre, then size per axis, in cells of the full shape.
        labels: int64 ``[K]``.
        scores: ``[K]``, from 0 to 1, float32 at the least.
        queries: int64 ``[K]``, the object query that found it.
        offsets: int64 ``[B + 1]``.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    queries: Tensor
    offsets: Tensor


class Detector(nn.Module):
    """Finds the objects on a pyramid of sparse features.

    Args:
        encoder: a pyramid to the same points with new values.
        selection: the encoder's pyramid to object queries.
        decoder: queries and pyramid to predictions.
        denoiser: adds noisy objects to the queries in training; None: nobody does.
    """

    def __init__(
        self,
        encoder: Encoder,
        selection: QuerySelection,
        decoder: Decoder,
        denoiser: Denoiser | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.selection, self.decoder = encoder, selection, decoder
        self.denoiser = denoiser

    def forward(self, pyramid: FeaturePyramid, targets: Targets | None = None) -> DetectorOutput:
        """Of a pyramid whose points are sorted by image, as `PointStem` makes it.

        Args:
            pyramid: what to look at.
            targets: what is there, which the denoiser needs in training; no one else looks at it.

        Raises:
            ValueError: a pyramid or targets that do not fit the parts, embeddings that are not
                finite (on the CPU), or no targets in training with a denoiser.
        """
        denoiser = self.denoiser if self.training else None
        if denoiser is not None and targets is None:
            refuse("targets", "Targets, for the denoiser in training", None)
        if isinstance(pyramid, FeaturePyramid) and reads_contents(None, pyramid.values.device):
            check_finite("pyramid.values", pyramid.values)
        encoded = self.encoder(pyramid)
        selection = self.selection(encoded)
        if denoiser is None:
            layers, queries = self.decoder(selection.queries, encoded)
            return DetectorOutput(encoded, selection, layers, queries)
        joined = denoiser(selection.queries, targets, encoded)
        layers, queries = self.decoder(joined.queries, encoded)
        own, noisy = map(list, zip(*map(joined.split, layers), strict=True))
        return DetectorOutput(encoded, selection, own, queries, Denoised(noisy, joined.matches))


@torch.no_grad()
def detections(predictions: Predictions, n_most: int = 100) -> Detections:
    """The surest (query, class) pairs of each image, ``n_most`` at most.

    Args:
        predictions: of a decoder's last layer.
        n_most: how many an image gets.

    Raises:
        ValueError: predictions that cannot be (`check_predictions`), ``n_most`` below 1.
    """
    check_predictions(predictions)
    check_counts(n_most=n_most)
    # Halves would make equals of scores that are not.
    scores = predictions.logits.to(coordinate_dtype(predictions.logits.dtype)).sigmoid()
    n_queries, n_classes = scores.shape
    image = batch_ids(predictions.offsets, n_queries).repeat_interleave(n_classes)
    batch_size = len(predictions.offsets) - 1
    chosen, offsets = best_per_image(scores.flatten(), image, batch_size, n_most)
    query = chosen.div(n_classes, rounding_mode="floor")
    return Detections(
        predictions.boxes[query], chosen % n_classes, scores.flatten()[chosen], query, offsets
    )
