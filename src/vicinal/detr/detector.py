"""A detector: encoder, selection of object queries, decoder."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._utils.checks import check_counts, check_finite, check_type, reads_contents, refuse
from .._utils.modules import Module
from .._utils.ragged import batch_ids
from ..pyramid import FeaturePyramid
from ..windows import coordinate_dtype
from .decoder import Decoder
from .denoising import DenoisingQueryGenerator
from .encoder import Encoder
from .selection import QuerySelection, QuerySelectionOutput
from .structures import (
    Matches,
    ObjectQueries,
    Predictions,
    Targets,
    check_predictions,
    top_k_per_image,
)


class DenoisingOutput(NamedTuple):
    """Predictions of the denoising queries.

    Attributes:
        layers: the predictions of each decoder layer.
        matches: the object of each prediction.

    Example:
        ```python
        import torch
        from vicinal.detr import DenoisingOutput, Matches, Predictions

        boxes, offsets = torch.tensor([[1.5, 1.5, 2.0, 2.0]]), torch.tensor([0, 1])
        layers = [Predictions(torch.zeros(1, 3), boxes, offsets)]
        output = DenoisingOutput(layers, Matches(torch.tensor([0]), torch.tensor([0])))
        assert len(output.layers) == 1
        ```
    """

    layers: list[Predictions]
    matches: Matches


class DetectorOutput(NamedTuple):
    """What a `Detector` returns for a batch of images.

    Attributes:
        pyramid: the encoder's points, which the object queries attended to.
        selection: the selected object queries, and the predictions at all candidates.
        layers: the predictions of each decoder layer, the last being the final ones.
        queries: the object queries that were passed to each decoder layer, denoising queries
            included.
        denoising: predictions of the denoising queries, or None if there were none.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.detr import DetectorOutput, ObjectQueries, Predictions, QuerySelectionOutput

        pyramid = FeaturePyramid(torch.randn(1, 8), torch.tensor([[0, 1, 1, 0]]), ((4, 4),), 1)
        boxes, offsets = torch.tensor([[1.5, 1.5, 2.0, 2.0]]), torch.tensor([0, 1])
        predictions = Predictions(torch.zeros(1, 3), boxes, offsets)
        queries = ObjectQueries(pyramid.values, boxes, pyramid.levels, offsets)
        row = torch.tensor([0])
        selection = QuerySelectionOutput(queries, predictions, pyramid.positions(), row, row)
        output = DetectorOutput(pyramid, selection, [predictions], [queries])
        assert output.denoising is None
        ```
    """

    pyramid: FeaturePyramid
    selection: QuerySelectionOutput
    layers: list[Predictions]
    queries: list[ObjectQueries]
    denoising: DenoisingOutput | None = None


class Detections(NamedTuple):
    """Detected objects, by image and then by descending score.

    Attributes:
        boxes: floating ``[K, 2P]``, center and size per axis, in cells of the full shape.
        labels: int64 ``[K]``, the class of each detection.
        scores: ``[K]``, in [0, 1], at least float32.
        queries: int64 ``[K]``, the row of the object query that each detection comes from.
        offsets: int64 ``[B + 1]``: image ``b`` owns the rows ``offsets[b]:offsets[b + 1]``.

    Example:
        ```python
        import torch
        from vicinal.detr import Predictions, select_detections

        predictions = Predictions(
            torch.tensor([[-2.0, 0.0], [1.0, -1.0]]), torch.rand(2, 4) + 1, torch.tensor([0, 2])
        )
        detections = select_detections(predictions, top_k=1)
        assert detections.labels.tolist() == [0]
        assert detections.queries.tolist() == [1]
        ```
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    queries: Tensor
    offsets: Tensor


class Detector(Module):
    """Detects objects on a pyramid of sparse features.

    A two-stage DETR (Carion et al., 2020; Zhu et al., 2021) on sparse data.

    Args:
        encoder: maps a pyramid to the same points with new values.
        selection: selects object queries among the encoder's points.
        decoder: maps object queries and the encoder's points to predictions.
        denoiser: adds denoising queries in training; None (default): no denoising.

    Raises:
        ValueError: a part is not a module.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
        from vicinal.detr import (
            Decoder, DecoderLayer, Detector, Encoder, EncoderLayer, FeedForward, QuerySelection,
            QuerySelfAttention,
        )

        def attention():
            return SparseNeighborhoodAttentionBlock(8, 2, n_levels=1, neighborhood_sizes=(3,))

        encoder = Encoder([EncoderLayer(attention(), FeedForward(8))], embed_dim=8)
        selection = QuerySelection(embed_dim=8, n_classes=3, n_queries=2)
        layer = DecoderLayer(QuerySelfAttention(8, 2), attention(), FeedForward(8))
        decoder = Decoder([layer], embed_dim=8, n_classes=3)
        detector = Detector(encoder, selection, decoder)

        coordinates = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 0], [0, 3, 3, 0]])
        pyramid = FeaturePyramid(torch.randn(3, 8), coordinates, ((4, 4),), batch_size=1)
        output = detector(pyramid)
        assert output.layers[-1].logits.shape == (2, 3)
        ```
    """

    def __init__(
        self,
        encoder: Encoder,
        selection: QuerySelection,
        decoder: Decoder,
        denoiser: DenoisingQueryGenerator | None = None,
    ) -> None:
        super().__init__()
        for name, part in {"encoder": encoder, "selection": selection, "decoder": decoder}.items():
            check_type(name, part, nn.Module)
        if denoiser is not None:
            check_type("denoiser", denoiser, nn.Module)
        self.encoder, self.selection, self.decoder = encoder, selection, decoder
        self.denoiser = denoiser

    def forward(self, pyramid: FeaturePyramid, targets: Targets | None = None) -> DetectorOutput:
        """Predicts objects.

        Args:
            pyramid: points with values ``[nnz, E]``, sorted by image, as `PointStem` returns them.
            targets: the objects, required in training with a denoiser, unused otherwise.

        Returns:
            the predictions of all decoder layers and what they were made from.

        Raises:
            ValueError: pyramid or targets do not fit the parts of the detector, values are not
                finite (on the CPU), or targets are missing in training with a denoiser.
        """
        denoiser = self.denoiser if self.training else None
        if denoiser is not None and targets is None:
            refuse("targets", "Targets, for the denoiser in training", None)
        if isinstance(pyramid, FeaturePyramid) and reads_contents(None, pyramid.values.device):
            check_finite("pyramid.values", pyramid.values)
        encoded = self.encoder(pyramid)
        selection = self.selection(encoded)
        if denoiser is None or targets is None:
            layers, queries = self.decoder(selection.queries, encoded)
            return DetectorOutput(encoded, selection, layers, queries)
        joined = denoiser(selection.queries, targets, encoded)
        layers, queries = self.decoder(joined.queries, encoded)
        own, noisy = map(list, zip(*map(joined.split, layers), strict=True))
        denoising = DenoisingOutput(noisy, joined.matches)
        return DetectorOutput(encoded, selection, own, queries, denoising)


@torch.no_grad()
def select_detections(predictions: Predictions, top_k: int = 100) -> Detections:
    """Selects the ``top_k`` (query, class) pairs of each image with the highest scores.

    As in Deformable DETR (Zhu et al., "Deformable DETR", 2021), a query can be selected with
    several classes; there is no non-maximum suppression.

    Args:
        predictions: of a decoder's last layer.
        top_k: number of detections per image at most; default 100.

    Returns:
        detections without gradients, by image and then by descending score.

    Raises:
        ValueError: predictions are not valid (`check_predictions`), or ``top_k`` is below 1.

    Example:
        ```python
        import torch
        from vicinal.detr import Predictions, select_detections

        logits = torch.tensor([[-2.0, 0.0], [1.0, -1.0]])
        predictions = Predictions(logits, torch.rand(2, 4) + 1, torch.tensor([0, 2]))
        detections = select_detections(predictions, top_k=2)
        confident = detections.scores > 0.6
        assert confident.tolist() == [True, False]
        ```
    """
    predictions = check_predictions(predictions)
    check_counts(top_k=top_k)
    # In half precision, the sigmoid maps distinct large logits to equal scores.
    scores = predictions.logits.to(coordinate_dtype(predictions.logits.dtype)).sigmoid()
    n_queries, n_classes = scores.shape
    image = batch_ids(predictions.offsets, n_queries).repeat_interleave(n_classes)
    batch_size = len(predictions.offsets) - 1
    chosen, offsets = top_k_per_image(scores.flatten(), image, batch_size, top_k)
    query = chosen.div(n_classes, rounding_mode="floor")
    return Detections(
        predictions.boxes[query], chosen % n_classes, scores.flatten()[chosen], query, offsets
    )
