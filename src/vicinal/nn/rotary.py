"""N-D rotary position encoding with learned frequencies."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.checks import check_tensor, refuse
from ..backends import check_backend, choose_backend
from ..windows import coordinate_dtype

_PATTERNS = ("single", "partition", "closure")
_EARLIER_BUFFERS = (
    "freq_group_pattern",
    "encoding_ranges",
    "freq_pos_indices",
    "freq_group_indices",
    "freq_head_indices",
    "freq_enc_indices",
)


class RotaryEncoding(nn.Module):
    """Rotates each head's channel pairs by angles that are linear in the position.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), in N
    dimensions with learned frequencies. A position has P spatial coordinates, then its level.

    Args:
        head_dim: channels per head, d. Even: the pairs are (0, 1), (2, 3), ...
        n_heads: number of heads, H.
        position_dim: number of spatial dimensions, P.
        spatial_base_theta: base of the initial frequencies of spatial coordinates. Default: 100.
        level_base_theta: base of the initial frequencies of the level. Default: 10.
        share_heads: whether all heads share one set of frequencies. Default: False.
        freq_group_pattern: the coordinates of each group of pairs. ``"single"`` (default): one
            group with all coordinates. ``"partition"``: space; level. ``"closure"``: space; level;
            all.
        enforce_freq_groups_equal: whether groups of unequal size raise a ValueError (default).
            Otherwise the first groups get one more pair each.
        backend: back end of the rotation, see `neighborhood_attention`.

    ``freqs[g]`` is the parameter of group g, ``[coordinates of g, H or 1, pairs of g]``.

    Raises:
        ValueError: ``head_dim`` is odd, the pattern is unknown, or groups have unequal sizes.

    Example:
        ```python
        import torch
        from vicinal import RotaryEncoding

        rotary = RotaryEncoding(head_dim=8, n_heads=2, position_dim=2)
        x = torch.randn(5, 2, 8)
        coordinates = torch.tensor([[3.5, 7.5, 0.0]]).expand(5, -1)  # row, column, level
        rotated = rotary(x, coordinates)
        torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
        ```
    """

    def __init__(
        self,
        head_dim: int,
        n_heads: int,
        position_dim: int,
        *,
        spatial_base_theta: float = 100.0,
        level_base_theta: float = 10.0,
        share_heads: bool = False,
        freq_group_pattern: str = "single",
        enforce_freq_groups_equal: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            refuse("head_dim", "an even number of channels per head", head_dim)
        if freq_group_pattern not in _PATTERNS:
            refuse("freq_group_pattern", f"one of {list(_PATTERNS)}", freq_group_pattern)
        check_backend(backend)
        self.head_dim, self.n_heads, self.position_dim = head_dim, n_heads, position_dim
        self.backend = backend
        self.thetas = [spatial_base_theta] * position_dim + [level_base_theta]
        space, level = list(range(position_dim)), [position_dim]
        self.groups = {
            "single": [space + level],
            "partition": [space, level],
            "closure": [space, level, space + level],
        }[freq_group_pattern]

        share, rest = divmod(head_dim // 2, len(self.groups))
        if rest and enforce_freq_groups_equal:
            expected = f"a multiple of {2 * len(self.groups)} for equal frequency groups"
            refuse("head_dim", f"{expected} ({freq_group_pattern!r})", head_dim)
        heads = 1 if share_heads else n_heads
        self.freqs = nn.ParameterList(
            torch.empty(len(group), heads, share + (index < rest))
            for index, group in enumerate(self.groups)
        )
        self.register_load_state_dict_pre_hook(_drop_constant_buffers)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all frequencies from their initial distribution."""
        for group, freqs in zip(self.groups, self.freqs, strict=True):
            n_pairs = freqs.shape[-1]
            steps = torch.arange(n_pairs, dtype=freqs.dtype, device=freqs.device) / max(n_pairs, 1)
            angle = torch.rand(*freqs.shape[:2], 1, dtype=freqs.dtype, device=freqs.device)
            thetas = [self.thetas[c] for c in group]
            theta = torch.tensor(thetas, dtype=freqs.dtype, device=freqs.device)
            freqs.copy_((2 * math.pi * angle).cos() * theta[:, None, None] ** -steps)

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """Rotates ``x`` ``[n, H, d]`` by the angles of ``coordinates`` ``[n, P + 1]``.

        Angles are computed in float64, so they are as exact at coordinates of 2^30 as near the
        origin; the rotation in float32, or float64 if ``x`` has that dtype. The result has the
        shape and dtype of ``x``. Back ends other than the reference sum the gradients of the
        frequencies in the dtype of the rotation: at large coordinates float32 holds them to 2^-24
        of the largest product with a coordinate.

        Raises:
            ValueError: shapes or devices do not match, or coordinates are integers.
        """
        check_tensor("x", x, ("n", self.n_heads, self.head_dim), kind="floating")
        shape = (x.shape[0], self.position_dim + 1)
        check_tensor("coordinates", coordinates, shape, kind="floating", device=x.device)
        coordinates = coordinates.to(coordinate_dtype(coordinates.dtype))
        backend = choose_backend(self.backend, x.device, x.dtype)
        return backend.rotate(x, coordinates, self.frequencies())

    def frequencies(self) -> Tensor:
        """Returns all frequencies ``[P + 1, H or 1, d / 2]``, zero outside a pair's group."""
        blocks = []
        for group, freqs in zip(self.groups, self.freqs, strict=True):
            above, below = group[0], self.position_dim - group[-1]
            blocks.append(nn.functional.pad(freqs, (0, 0, 0, 0, above, below)))
        return torch.cat(blocks, -1)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, n_heads={self.n_heads}, position_dim={self.position_dim}"


def _drop_constant_buffers(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Accepts checkpoints of the earlier implementation, which hold index tables as well."""
    for name in _EARLIER_BUFFERS:
        state_dict.pop(prefix + name, None)
