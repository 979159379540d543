"""Attention modules: the neighborhood attention block, deformable attention, rotary positions."""

from .block import SparseNeighborhoodAttentionBlock
from .deformable import SparseDeformableAttention
from .rotary import RotaryEncoding

__all__ = [
    "RotaryEncoding",
    "SparseDeformableAttention",
    "SparseNeighborhoodAttentionBlock",
]
