"""Rotary positions relative to boxes, against blocks with other frequencies."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.box_relative import FREQUENCIES, BoxRelativeAttention
from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
from vicinal.detr import (
    DecoderLayer,
    FeedForward,
    ObjectQueries,
    QuerySelfAttention,
    ReferencePoints,
)


def test_frequencies_are_inverse_to_the_size_of_the_box() -> None:
    torch.manual_seed(0)
    block = SparseNeighborhoodAttentionBlock(8, 2, 1, (9,)).double()
    points = ReferencePoints(8)
    layer = DecoderLayer(
        QuerySelfAttention(8, 2), block, FeedForward(8), reference_points=points
    ).double()
    cells = torch.randint(12, (2, 60, 2)).unique(dim=1)
    coordinates = torch.cat([torch.nn.functional.pad(x, (1, 1), value=0) for x in cells])
    coordinates[len(cells[0]) :, 0] = 1
    values = torch.randn(len(coordinates), 8, dtype=torch.float64)
    pyramid = FeaturePyramid(values, coordinates, ((12, 12),), batch_size=2)
    sizes = torch.tensor([4.0, 8.0, 8.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    boxes = torch.cat((6 + 3 * torch.randn(6, 2), sizes[:, None].expand(-1, 2)), 1).double()
    queries = ObjectQueries(
        torch.randn(6, 8, dtype=torch.float64),
        boxes,
        torch.zeros(6, dtype=torch.int64),
        torch.tensor([0, 2, 6]),
    )

    def attended(scale: float) -> Tensor:
        """All queries, by the block with other spatial frequencies."""
        state = {name: x.detach().clone() for name, x in layer.state_dict().items()}
        state[f"cross_attention.{FREQUENCIES}"][:2] *= scale
        out: Tensor = torch.func.functional_call(layer, state, (queries, pyramid))
        return out

    by_size = {size: attended(4 / size) for size in (2, 4, 8)}
    relative: Any = BoxRelativeAttention(layer, mean_size=4.0)
    layer.cross_attention = relative
    ours = layer(queries, pyramid)
    for row, size in enumerate(sizes.tolist()):
        torch.testing.assert_close(ours[row], by_size[int(size)][row], rtol=0, atol=1e-12)
    assert not torch.allclose(by_size[8][1], by_size[4][1])
