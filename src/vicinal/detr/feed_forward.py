"""The feed-forward part of a transformer layer."""

from torch import Tensor, nn

from .._utils.checks import check_counts, check_dropout, check_tensor


class FeedForward(nn.Module):
    """``x + W_2 gelu(W_1 norm(x))``, or with the norm after the sum.

    Vaswani et al., "Attention Is All You Need" (2017).

    Args:
        embed_dim: width of the input and of the output, E.
        hidden_dim: width in between; None: ``4 * embed_dim``.
        dropout: rate after each of the two maps, in training.
        norm_first: layer norm on the input, else after the residual.

    Raises:
        ValueError: widths below 1, a dropout outside [0, 1).
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        norm_first: bool = True,
    ) -> None:
        super().__init__()
        hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
        check_counts(embed_dim=embed_dim, hidden_dim=hidden_dim)
        check_dropout("dropout", dropout)
        self.embed_dim, self.norm_first = embed_dim, norm_first
        self.norm = nn.LayerNorm(embed_dim)
        self.layers = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, embed_dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[n, E]`` to ``[n, E]``.

        Raises:
            ValueError: ``x`` of another shape.
        """
        check_tensor("x", x, ("n", self.embed_dim), kind="floating")
        if self.norm_first:
            return x + self.layers(self.norm(x))  # type: ignore[no-any-return]
        return self.norm(x + self.layers(x))  # type: ignore[no-any-return]
