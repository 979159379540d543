"""Multi-level sparse neighborhood attention for PyTorch."""

from ._version import __version__
from .attention import (
    Background,
    NeighborhoodWeights,
    neighborhood_attention,
    neighborhood_attention_weights,
)
from .block import SparseNeighborhoodAttentionBlock
from .deformable import SparseDeformableAttention
from .neighborhoods import get_multilevel_neighborhoods
from .plan import NeighborhoodPlan, plan_neighborhoods
from .pyramid import FeaturePyramid
from .rotary import RotaryEncoding
from .tiles import NeighborSlices

__all__ = [
    "Background",
    "FeaturePyramid",
    "NeighborSlices",
    "NeighborhoodPlan",
    "NeighborhoodWeights",
    "RotaryEncoding",
    "SparseDeformableAttention",
    "SparseNeighborhoodAttentionBlock",
    "__version__",
    "get_multilevel_neighborhoods",
    "neighborhood_attention",
    "neighborhood_attention_weights",
    "plan_neighborhoods",
]
