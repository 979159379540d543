"""Attention modules: the neighborhood attention block, deformable attention, rotary positions."""

from .._index.cell_hash import CellIndex
from .block import SparseNeighborhoodAttentionBlock
from .deformable import SparseDeformableAttention
from .rotary import RotaryEncoding

__all__ = [
    "CellIndex",
    "RotaryEncoding",
    "SparseDeformableAttention",
    "SparseNeighborhoodAttentionBlock",
]
