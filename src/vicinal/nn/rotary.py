"""N-D rotary positions: rotations of channel pairs by learned combinations of coordinates."""

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
    """Rotates each head's channel pairs by angles linear in position, with learned frequencies.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), in N
    dimensions. A position has P spatial coordinates and then its level.

    Args:
        head_dim: channels per head, even: the pairs are (0, 1), (2, 3), ...
        n_heads: number of heads.
        position_dim: number of spatial dimensions, P.
        spatial_base_theta, level_base_theta: bases of the initial frequencies.
        share_heads: one set of frequencies for all heads.
        freq_group_pattern: which coordinates the pairs see. ``"single"``: one group of pairs sees
            all; ``"partition"``: one sees space, one the level; ``"closure"``: space, level, all.
        enforce_freq_groups_equal: refuse groups of unequal size. Otherwise the first groups get
            one pair more.
        backend: see `neighborhood_attention`.

    ``freqs[g]`` is group g's parameter, ``[its coordinates, H or 1, its pairs]``.

    Raises:
        ValueError: an odd ``head_dim``, an unknown pattern, or groups of unequal size.
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
        """Draws all frequencies anew."""
        for group, freqs in zip(self.groups, self.freqs, strict=True):
            n_pairs = freqs.shape[-1]
            steps = torch.arange(n_pairs, dtype=freqs.dtype, device=freqs.device) / max(n_pairs, 1)
            angle = torch.rand(*freqs.shape[:2], 1, dtype=freqs.dtype, device=freqs.device)
            thetas = [self.thetas[c] for c in group]
            theta = torch.tensor(thetas, dtype=freqs.dtype, device=freqs.device)
            freqs.copy_((2 * math.pi * angle).cos() * theta[:, None, None] ** -steps)

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """Rotates ``x`` ``[n, H, d]`` to ``coordinates`` ``[n, P + 1]``; same shape and dtype.

        Angles and rotation are computed in the coordinates' dtype or wider, float32 at the least.

        Raises:
            ValueError: shapes or devices do not fit, or coordinates are integers.
        """
        check_tensor("x", x, ("n", self.n_heads, self.head_dim), kind="floating")
        shape = (x.shape[0], self.position_dim + 1)
        check_tensor("coordinates", coordinates, shape, kind="floating", device=x.device)
        coordinates = coordinates.to(coordinate_dtype(coordinates.dtype))
        backend = choose_backend(self.backend, x.device, x.dtype)
        return backend.rotate(x, coordinates, self.frequencies())

    def frequencies(self) -> Tensor:
        """``[P + 1, H or 1, d / 2]``: all pairs' frequencies, zero where a pair does not see."""
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
    """The earlier implementation saved index tables beside the frequencies."""
    for name in _EARLIER_BUFFERS:
        state_dict.pop(prefix + name, None)
