"""Norms of modules: gradients have the same bits for any number of CPU threads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detr_scenes import make_queries
from torch import Tensor, nn

from vicinal import (
    FeaturePyramid,
    SparseDeformableAttention,
    SparseNeighborhoodAttentionBlock,
)
from vicinal._utils.types import BackendName
from vicinal.detr import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    PointStem,
    QuerySelfAttention,
)

EMBED, HEADS = 36, 3
POINTS, QUERIES = (500, 0, 300), (130, 0, 90)


def make_points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.repeat_interleave(torch.arange(3), torch.tensor(POINTS))
    cells = torch.randint(0, 48, (sum(POINTS), 2), generator=generator)
    values = torch.randn(sum(POINTS), EMBED, generator=generator)
    return torch.cat((image[:, None], cells), 1), values


def make_pyramid() -> FeaturePyramid:
    return FeaturePyramid.from_points(*make_points(), (48, 48), 3, strides=(1, 2))


def block(norm_first: bool, backend: BackendName = "cpu") -> Any:
    return SparseNeighborhoodAttentionBlock(
        EMBED, HEADS, 2, (3, 5), norm_first=norm_first, bias=True, backend=backend
    )


def deformable(norm_first: bool) -> Any:
    return SparseDeformableAttention(EMBED, HEADS, 2, 2, norm_first=norm_first)


def encode(module: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    return module, lambda: module.encode(make_pyramid()).values


def encoder(norm_first: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    parts = block(norm_first), FeedForward(EMBED, EMBED, norm_first=norm_first)
    module = Encoder([EncoderLayer(*parts)], EMBED)
    return module, lambda: module(make_pyramid()).values


def decoder(norm_first: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    layer = DecoderLayer(
        QuerySelfAttention(EMBED, HEADS, norm_first=norm_first),
        deformable(norm_first),
        FeedForward(EMBED, EMBED, norm_first=norm_first),
    )
    module = Decoder([layer], EMBED, 2)
    queries = make_queries(QUERIES, embed_dim=EMBED, dtype=torch.float32)

    def run() -> Tensor:
        predictions, _ = module(queries, make_pyramid())
        return torch.cat((predictions[-1].logits, predictions[-1].boxes), 1)

    return module, run


def stem(_: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    module = PointStem(EMBED, EMBED, strides=(1, 2), window_sizes=(3,), window_strides=(1,))
    return module, lambda: module(*make_points(), (48, 48), 3).values


CASES: dict[str, Callable[[bool], tuple[nn.Module, Callable[[], Tensor]]]] = {
    "block": lambda norm_first: encode(block(norm_first)),
    "block of the reference": lambda norm_first: encode(block(norm_first, "reference")),
    "deformable": lambda norm_first: encode(deformable(norm_first)),
    "encoder": encoder,
    "decoder": decoder,
    "stem": stem,
}


@pytest.fixture
def products_of_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products of modules that do not depend on threads. Those of BLAS may, for some sizes:
    then the norms' gradients are sums of other numbers.
    """

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = (x[..., None, :] * weight).sum(-1)
        return out if bias is None else out + bias

    monkeypatch.setattr(torch.nn.functional, "linear", linear)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("restored_threads", "products_of_fixed_order")
def test_gradients_of_norms_have_the_same_bits(case: str, norm_first: bool) -> None:
    torch.manual_seed(0)
    module, run = CASES[case](norm_first)
    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
    parameters = [parameter for norm in norms for parameter in norm.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    answers = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        answers.append(torch.autograd.grad(run().sin().sum(), parameters))
    assert len(answers[0]) >= 2
    for other in answers[1:]:
        assert all(map(torch.equal, other, answers[0]))
