"""Cross-attention whose rotary positions are relative to the size of each query's box."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
from vicinal.detr import DecoderLayer

FREQUENCIES = "pos_encoding.freqs.0"


class BoxRelativeAttention(nn.Module):
    """A block of a decoder whose rotary frequencies are inverse to the size of a query's box.

    So an offset rotates by its share of the box, in a large one as in a small one. Queries of about
    one size, rounded to a power of the square root of 2, share the rotated keys.

    Args:
        layer: of the decoder, whose block this one shall replace.
        mean_size: of the boxes that keep the block's own frequencies, in cells of the full shape.
    """

    def __init__(self, layer: DecoderLayer, mean_size: float) -> None:
        super().__init__()
        block, points = layer.cross_attention, layer.reference_points
        assert isinstance(block, SparseNeighborhoodAttentionBlock)
        self.block = block
        self.n_rows = 1 if points is None else len(points.relative_positions)
        self.mean_size, self.steps = mean_size, torch.empty(0)
        layer.register_forward_pre_hook(self.measure)

    def measure(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Finds the sizes of the boxes whose rows come next."""
        size = arguments[0].boxes[:, 2:].log2().mean(1) - math.log2(self.mean_size)
        self.steps = (2 * size).round().clamp(-2, 2).repeat_interleave(self.n_rows)

    def make_plan(self, *arguments: Any) -> None:
        """None: each size has a plan of its own."""

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        offsets: Tensor,
        pyramid: FeaturePyramid,
        *,
        query_level_indices: Tensor,
        plan: None,
    ) -> Tensor:
        image = torch.searchsorted(offsets[1:], torch.arange(len(positions)), right=True)
        rows, attended = [], []
        for step in self.steps.unique():
            rows.append((self.steps == step).nonzero().flatten())
            counts = image[rows[-1]].bincount(minlength=len(offsets) - 1)
            attended.append(
                torch.func.functional_call(
                    self.block,
                    {FREQUENCIES: self.frequencies(step)},
                    (
                        embeddings[rows[-1]],
                        positions[rows[-1]],
                        torch.cat((counts.new_zeros(1), counts.cumsum(0))),
                        pyramid,
                    ),
                    {"query_level_indices": query_level_indices[rows[-1]]},
                )
            )
        return torch.cat(attended)[torch.cat(rows).argsort()]

    def frequencies(self, step: Tensor) -> Tensor:
        """Those of the block for boxes of a size; that of the level stays."""
        *space, level = self.block.get_parameter(FREQUENCIES)
        return torch.stack([*(axis * 2 ** (-step / 2) for axis in space), level])
