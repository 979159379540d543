"""The parts of a DETR (detection transformer) on sparse data, from a stem to the training loss.

Boxes are ``[n, 2P]``, the center per axis and then the size per axis, in cells of the full shape
and in the pyramid's order of axes. Batches are ragged: the rows of all images are concatenated,
and int64 offsets ``[B + 1]`` mark them; image ``b`` owns the rows ``offsets[b]:offsets[b + 1]``.
"""

from .boxes import (
    apply_deltas,
    box_period,
    boxes_to_corners,
    corners_to_boxes,
    encode_boxes,
    generalized_iou,
    iou,
    pairwise_generalized_iou,
    pairwise_iou,
    relative_l1,
)
from .decoder import Decoder, DecoderLayer
from .denoising import (
    DenoisingQueries,
    DenoisingQueryGenerator,
    QueriesWithDenoising,
    make_denoising_queries,
)
from .detector import DenoisingOutput, Detections, Detector, DetectorOutput, select_detections
from .encoder import Encoder, EncoderLayer
from .focal import LossWeights, sigmoid_focal_loss, varifocal_loss
from .layers import DetectionHead, FeedForward, QuerySelfAttention
from .losses import DetectionLoss, LossTerms, SetCriterion, mean_object_count, sum_losses
from .matching import HungarianMatcher, assign_points_to_boxes
from .reference_points import ReferencePoints
from .selection import QuerySelection, QuerySelectionOutput
from .stem import PointStem
from .structures import (
    Matches,
    ObjectQueries,
    Predictions,
    Targets,
    check_predictions,
    check_targets,
)

__all__ = [
    "Decoder",
    "DecoderLayer",
    "DenoisingOutput",
    "DenoisingQueries",
    "DenoisingQueryGenerator",
    "DetectionHead",
    "DetectionLoss",
    "Detections",
    "Detector",
    "DetectorOutput",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "HungarianMatcher",
    "LossTerms",
    "LossWeights",
    "Matches",
    "ObjectQueries",
    "PointStem",
    "Predictions",
    "QueriesWithDenoising",
    "QuerySelection",
    "QuerySelectionOutput",
    "QuerySelfAttention",
    "ReferencePoints",
    "SetCriterion",
    "Targets",
    "apply_deltas",
    "assign_points_to_boxes",
    "box_period",
    "boxes_to_corners",
    "check_predictions",
    "check_targets",
    "corners_to_boxes",
    "encode_boxes",
    "generalized_iou",
    "iou",
    "make_denoising_queries",
    "mean_object_count",
    "pairwise_generalized_iou",
    "pairwise_iou",
    "relative_l1",
    "select_detections",
    "sigmoid_focal_loss",
    "sum_losses",
    "varifocal_loss",
]
