"""What becomes of an embedding: a score per class and a better box."""

import math

from torch import Tensor, nn

from .._utils.checks import check_counts, check_tensor
from .boxes import refine

_PRIOR = 0.01  # what scores begin with, so that the many empty places do not drown the objects


class DetectionHead(nn.Module):
    """Class logits and a refined box of each embedding.

    Scores are independent sigmoids (Lin et al., "Focal Loss for Dense Object Detection", 2017).
    Boxes move by shares of their own size, so nothing depends on how large the map is.

    Args:
        embed_dim: E.
        n_classes: number of classes, C.
        position_dim: number of spatial dimensions, P.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(self, embed_dim: int, n_classes: int, position_dim: int = 2) -> None:
        super().__init__()
        check_counts(embed_dim=embed_dim, n_classes=n_classes, position_dim=position_dim)
        self.embed_dim, self.position_dim = embed_dim, position_dim
        self.classes = nn.Linear(embed_dim, n_classes)
        self.box = nn.Sequential(
            nn.Linear(embed_dim, embed_dim),
            nn.GELU(),
            nn.Linear(embed_dim, embed_dim),
            nn.GELU(),
            nn.Linear(embed_dim, 2 * position_dim),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew: scores low, boxes where they were."""
        for part in (self.classes, *self.box):
            if isinstance(part, nn.Linear):
                part.reset_parameters()
        nn.init.constant_(self.classes.bias, -math.log((1 - _PRIOR) / _PRIOR))
        last = self.box[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, embeddings: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[n, C]`` and boxes ``[n, 2P]`` of embeddings ``[n, E]`` at boxes ``[n, 2P]``.

        Raises:
            ValueError: shapes, dtypes or devices do not fit.
        """
        check_tensor("embeddings", embeddings, ("n", self.embed_dim), kind="floating")
        where = (len(embeddings), 2 * self.position_dim)
        check_tensor("boxes", boxes, where, kind="floating", device=embeddings.device)
        logits: Tensor = self.classes(embeddings)
        return logits, refine(boxes, self.box(embeddings))
