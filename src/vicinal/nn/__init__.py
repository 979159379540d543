"""Attention modules: the neighborhood attention block, deformable attention, rotary positions."""

from .._index.cell_hash import CellIndex
from .block import SparseNeighborhoodAttentionBlock
from .deformable import SparseDeformableAttention
from .earlier_checkpoints import export_state_dict
from .rotary import FreqGroupPattern, RotaryEncoding
from .row_dropout import RowDropout

__all__ = [
    "CellIndex",
    "FreqGroupPattern",
    "RotaryEncoding",
    "RowDropout",
    "SparseDeformableAttention",
    "SparseNeighborhoodAttentionBlock",
    "export_state_dict",
]
