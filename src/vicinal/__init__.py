"""Multi-level sparse neighborhood attention for PyTorch."""

from ._index.copies import PointCopies
from ._plan.statistics import NeighborStatistics
from ._version import __version__
from .attention import (
    Background,
    NeighborhoodWeights,
    neighborhood_attention,
    neighborhood_attention_weights,
)
from .batching import collate_pyramids
from .config import show_config
from .nn.block import SparseNeighborhoodAttentionBlock
from .nn.deformable import SparseDeformableAttention
from .nn.earlier_checkpoints import export_state_dict
from .nn.rotary import FreqGroupPattern, RotaryEncoding
from .placement import QueryPlacement
from .plan import NeighborhoodPlan, plan_neighborhoods
from .pyramid import FeaturePyramid
from .suggest import suggest_windows
from .voxels import Voxels, voxelize
from .window_shapes import Window
from .windows import cell_positions, get_multilevel_neighborhoods

__all__ = [
    "Background",
    "FeaturePyramid",
    "FreqGroupPattern",
    "NeighborStatistics",
    "NeighborhoodPlan",
    "NeighborhoodWeights",
    "PointCopies",
    "QueryPlacement",
    "RotaryEncoding",
    "SparseDeformableAttention",
    "SparseNeighborhoodAttentionBlock",
    "Voxels",
    "Window",
    "__version__",
    "cell_positions",
    "collate_pyramids",
    "export_state_dict",
    "get_multilevel_neighborhoods",
    "neighborhood_attention",
    "neighborhood_attention_weights",
    "plan_neighborhoods",
    "show_config",
    "suggest_windows",
    "voxelize",
]
