"""Parts of a DETR on sparse data: boxes, targets, matching, losses and denoising.

Boxes are ``[n, 2P]``, the centre per axis, then the size per axis, in cells of the full shape and
in the pyramid's order of axes. Batches are ragged: rows of all images one after another, and
int64 offsets ``[B + 1]``; image ``b`` owns the rows ``offsets[b]:offsets[b + 1]``.
"""

from .boxes import (
    corners,
    deltas,
    from_corners,
    generalized_iou,
    iou,
    pairwise_generalized_iou,
    pairwise_iou,
    refine,
    relative_l1,
)
from .criterion import SetCriterion, total
from .decoder import Decoder, DecoderLayer
from .denoising import Denoiser, Joined
from .detector import Denoised, Detections, Detector, DetectorOutput, detections
from .encoder import Encoder, EncoderLayer
from .feed_forward import FeedForward
from .focal import sigmoid_focal_loss, varifocal_loss
from .heads import DetectionHead
from .losses import DetectionLoss, LossParts, mean_objects
from .matching import HungarianMatcher, Matches, assign_inside
from .noisy_queries import DenoisingQueries, noisy_queries
from .queries import ObjectQueries
from .selection import QuerySelection, Selection
from .self_attention import QuerySelfAttention
from .stem import PointStem
from .targets import Predictions, Targets, check_predictions, check_targets

__all__ = [
    "Decoder",
    "DecoderLayer",
    "Denoised",
    "Denoiser",
    "DenoisingQueries",
    "DetectionHead",
    "DetectionLoss",
    "Detections",
    "Detector",
    "DetectorOutput",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "HungarianMatcher",
    "Joined",
    "LossParts",
    "Matches",
    "ObjectQueries",
    "PointStem",
    "Predictions",
    "QuerySelection",
    "QuerySelfAttention",
    "Selection",
    "SetCriterion",
    "Targets",
    "assign_inside",
    "check_predictions",
    "check_targets",
    "corners",
    "deltas",
    "detections",
    "from_corners",
    "generalized_iou",
    "iou",
    "mean_objects",
    "noisy_queries",
    "pairwise_generalized_iou",
    "pairwise_iou",
    "refine",
    "relative_l1",
    "sigmoid_focal_loss",
    "total",
    "varifocal_loss",
]
