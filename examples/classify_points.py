"""Classifies handwritten digits given as point sets: ``python -m examples.classify_points``.

The pixels with ink are the points of an image, so images have different numbers of points and the
empty pixels cost nothing. Training takes about a minute on two CPU cores.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.canvas import Digits, load_digits
from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock, plan_neighborhoods
from vicinal.detr import FeedForward

STRIDES, WINDOWS = (1, 2, 4), (5, 5, 5)  # of the pyramid levels, finest first
FAINTEST = 0.25  # ink of the pixels that become points


class PointSetClassifier(nn.Module):
    """Images ``[B, H, W]`` to logits ``[B, n_classes]``."""

    def __init__(self, n_classes: int = 10, embed_dim: int = 32, n_layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, embed_dim))
        self.attention = nn.ModuleList(
            SparseNeighborhoodAttentionBlock(embed_dim, 4, len(STRIDES), WINDOWS)
            for _ in range(n_layers)
        )
        self.feed_forward = nn.ModuleList(FeedForward(embed_dim) for _ in range(n_layers))
        self.head = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, n_classes))

    def forward(self, images: Tensor) -> Tensor:
        pixels = (images > FAINTEST).nonzero()  # [n, 3]: image, row, column
        ink = images[tuple(pixels.t())][:, None]
        # The attention encodes relative positions; the features add the absolute ones, in [-1, 1].
        position = 2 * pixels[:, 1:] / torch.tensor(images.shape[1:]) - 1
        features = self.stem(torch.cat((ink, position), 1))
        pyramid = FeaturePyramid.from_points(
            pixels, features, images.shape[1:], len(images), strides=STRIDES
        )
        # Every point is a query. Positions are the same in all layers, so the layers share a plan.
        positions, offsets = pyramid.positions(), pyramid.batch_offsets()
        plan = plan_neighborhoods(positions, offsets, pyramid, WINDOWS)
        for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
            x = attention(
                pyramid.values, positions, offsets, pyramid,
                query_level_indices=pyramid.levels, plan=plan,
            )  # fmt: skip
            pyramid = pyramid.with_values(feed_forward(x))
        # The points of an image are consecutive rows, so offsets delimit the images.
        logits: Tensor = self.head(torch.segment_reduce(pyramid.values, "mean", offsets=offsets))
        return logits


def train(digits: Digits, epochs: int = 4, batch_size: int = 32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = PointSetClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    n_steps = epochs * -(-len(digits.labels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, n_steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(digits.labels)).split(batch_size):
            loss = F.cross_entropy(model(digits.images[rows]), digits.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}", flush=True)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits, batch_size: int = 200) -> float:
    batches = zip(digits.images.split(batch_size), digits.labels.split(batch_size), strict=True)
    correct = [model(images).argmax(1) == labels for images, labels in batches]
    return torch.cat(correct).float().mean().item()


def main() -> None:
    name = "python -m examples.classify_points"
    argparse.ArgumentParser(prog=name, description=__doc__).parse_args()
    digits = load_digits()
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(0))
    model = train(digits.take(order[1000:]))
    print(f"accuracy on 1,000 test images: {accuracy(model, digits.take(order[:1000])):.1%}")


if __name__ == "__main__":
    main()
