"""Windows of hits sorted by azimuth, against attention with a mask over all pairs."""

import pytest
import torch
from problems import assert_close
from torch import Tensor

from benchmarks.baselines.azimuth import AzimuthAttention
from vicinal import FeaturePyramid
from vicinal.nets import PointUNet

SHAPE = (4, 4096, 16)
EVERY = 7  # rows, of which one is compared


def events(*sizes: int) -> tuple[FeaturePyramid, Tensor, Tensor]:
    """Hits, each alone at its azimuth."""
    torch.manual_seed(0)
    rows = []
    for event, n in enumerate(sizes):
        azimuth = torch.randperm(SHAPE[1])[:n]
        others = [torch.randint(size, (n,)) for size in (SHAPE[0], SHAPE[2])]
        ends = torch.full((n,), event), torch.zeros(n, dtype=torch.int64)
        rows.append(torch.stack((ends[0], others[0], azimuth, others[1], ends[1]), 1))
    coordinates = torch.cat(rows)
    values = torch.randn(len(coordinates), 16, dtype=torch.float64)
    pyramid = FeaturePyramid(values, coordinates, (SHAPE,), len(sizes), periodic_axes=(1,))
    return pyramid, pyramid.positions(torch.float64), pyramid.batch_offsets()


def by_pairs(
    attention: AzimuthAttention, pyramid: FeaturePyramid, positions: Tensor, window: int = 64
) -> Tensor:
    """Some rows by all pairs of an event, the key's position the short way around."""
    x = pyramid.values
    q, k, v = (
        attention.in_proj(attention.norm(x)).unflatten(1, (3, attention.n_heads, -1)).unbind(1)
    )
    attended = torch.zeros_like(v)
    for row in range(0, len(x), EVERY):
        own = (pyramid.batch == pyramid.batch[row]).nonzero().flatten()
        n = len(own)
        half = min(window // 2, (n - 1) // 2)
        rank = positions[own, 1].argsort().argsort()
        mine = int(rank[own == row])
        steps = (rank - mine + n // 2) % n - n // 2  # the short way around
        near = steps.abs() <= half
        keys = positions[own].clone()
        keys[:, 1] += SHAPE[1] * torch.div(mine + steps, n, rounding_mode="floor")
        zeros = keys.new_zeros(len(keys), 1)
        places = torch.cat((keys, zeros), 1)
        rotated, values = (attention.pos_encoding(part[own], places) for part in (k, v))
        place = torch.cat((positions[row : row + 1], zeros[:1]), 1)
        query = attention.pos_encoding(q[row : row + 1], place)
        logits = (query * rotated).sum(-1) / query.shape[-1] ** 0.5
        weights = logits.masked_fill(~near[:, None], -torch.inf).softmax(0)
        attended[row] = attention.pos_encoding((weights[..., None] * values).sum(0)[None], -place)
    out: Tensor = (x + attention.out_proj(attended.flatten(1)))[::EVERY]
    return out


@pytest.mark.parametrize("sizes", [(300, 20, 513), (1,), (2, 13)])
def test_windows_pass_the_seam(sizes: tuple[int, ...]) -> None:
    pyramid, positions, offsets = events(*sizes)
    attention = AzimuthAttention(16, 2, axis=1, window=64).double()
    with torch.no_grad():
        out = attention(pyramid.values, positions, offsets, pyramid)
        assert_close(out[::EVERY], by_pairs(attention, pyramid, positions), 1e-11)


def test_it_takes_the_place_of_the_block_in_a_net() -> None:
    net = PointUNet(
        *(1, 2, 16, 2, 1),
        position_dim=3,
        stem_window_sizes=(3,),
        stem_window_strides=(1,),
        make_attention=lambda level: AzimuthAttention(16, 2, axis=1),
    )
    hits = torch.stack([torch.randint(size, (700,)) for size in (2, *SHAPE)], 1)
    logits = net(hits, torch.rand(700, 1), SHAPE, 2, periodic_axes=(1,))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
